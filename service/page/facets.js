// Facets: what the candidates of a search have in common, as buttons that set a filter or take it away again.

import { byId, element } from "./api.js";

const SHOWN = 8;

// Each group: its title, its values, and the form fields that a value sets.
const groups = (facets) => [
  ["Departments", facets.top_category, ({ value }) => ({ category: value })],
  ["Categories", facets.category, ({ value }) => ({ category: value })],
  ["Brands", facets.brand, ({ value }) => ({ brand: value })],
  ["Prices", facets.price, ({ price_min, price_max }) => ({ "price-min": String(price_min), "price-max": String(price_max) })],
];

const isSet = (fields) => Object.entries(fields).every(([id, value]) => byId(id).value.toLowerCase() === value.toLowerCase());

export function showFacets(facets, search) {
  const pressed = document.activeElement.dataset.choice;
  const drawn = groups(facets).map(([title, values, fields]) => group(title, values, fields, search));
  byId("facets").replaceChildren(...drawn.filter((node) => node));
  if (pressed) byId("facets").querySelector(`[data-choice="${CSS.escape(pressed)}"]`)?.focus();
  byId("counted").textContent = facets.candidates ? `Counts are of the ${facets.candidates} candidates of this search.` : "";
}

// A single value that is not chosen narrows nothing down.
function group(title, values, fields, search) {
  if (values.length < 2 && !values.some((value) => isSet(fields(value)))) return null;
  const node = element("div", "", "facet");
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", title);
  node.append(element("p", title), ...values.slice(0, SHOWN).map((value) => choice(title, value, fields(value), search)));
  return node;
}

function choice(title, value, fields, search) {
  const button = element("button"), name = value.value ?? range(value), chosen = isSet(fields);
  button.type = "button";
  button.dataset.choice = `${title} ${name}`;
  button.setAttribute("aria-pressed", chosen);
  button.append(element("span", name), " ", element("span", value.count, "count"));
  button.addEventListener("click", () => {
    for (const [id, wanted] of Object.entries(fields)) set(byId(id), chosen ? "" : wanted);
    search();
  });
  return button;
}

const range = ({ price_min, price_max }) => (price_min === price_max ? `${price_min}` : `${price_min} – ${price_max}`);

function set(field, value) {
  if (field.options && ![...field.options].some((option) => option.value === value)) field.append(new Option(value, value));
  field.value = value;
}

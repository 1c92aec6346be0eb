// The search page: one form, one list. All text enters the page as text.

import { byId, call, element, post } from "./api.js";
import { explain } from "./explain.js";
import { showFacets } from "./facets.js";
import { mark, movement, summary } from "./movement.js";
import { clicked, forget, greet, user, watch } from "./shopper.js";

const form = byId("form"), query = byId("query"), status = byId("status"), results = byId("results"), again = byId("again");
// What the address holds. The user is not in it: a shared address must not share the one who shared it.
const FIELDS = {
  variant: "variant", category: "category", brand: "brand", "price-min": "price_min", "price-max": "price_max",
  after: "published_after",
};
let latest = 0; // the number of the newest search; older answers are dropped

const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));

function asked() {
  const filters = {
    category: byId("category").value || undefined,
    brand: byId("brand").value.trim() || undefined,
    price_min: number("price-min"),
    price_max: number("price-max"),
    in_stock: byId("in-stock").checked || undefined,
    published_after: byId("after").value || undefined,
  };
  return { query: query.value, user_id: user() || undefined, limit: 20, filters, facets: true, explain: true };
}

// The address holds the search, so that it can be shared and the back button works.
function address() {
  const parts = new URLSearchParams({ q: query.value });
  for (const [id, name] of Object.entries(FIELDS)) if (byId(id).value) parts.set(name, byId(id).value);
  if (byId("in-stock").checked) parts.set("in_stock", "true");
  return `/?${parts}`;
}

function fromAddress() {
  const parts = new URLSearchParams(location.search);
  query.value = parts.get("q") ?? "";
  for (const [id, name] of Object.entries(FIELDS)) byId(id).value = parts.get(name) ?? "";
  byId("in-stock").checked = parts.get("in_stock") === "true";
  if (query.value) search(false);
  else idle();
}

function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
  again.hidden = true;
}

function clear() {
  for (const id of ["results", "facets", "counted"]) byId(id).replaceChildren();
  byId("about").hidden = true;
}

function idle() {
  latest += 1;
  document.body.removeAttribute("aria-busy");
  clear();
  byId("start").hidden = false;
  say("");
}

async function search(remember = true) {
  if (!query.value.trim()) return idle();
  const mine = ++latest;
  if (remember && address() !== location.pathname + location.search) history.pushState(null, "", address());
  document.body.setAttribute("aria-busy", "true");
  byId("start").hidden = true;
  say("Searching…");
  const wanted = asked(), forced = byId("variant").value;
  try {
    const answer = await post("/v1/search", wanted, forced ? { "X-OneSearch-Variant": forced } : {});
    if (mine === latest) show(answer, movement(wanted, answer.items));
  } catch (error) {
    if (mine === latest) fail(error);
  } finally {
    if (mine === latest) document.body.removeAttribute("aria-busy");
  }
}

const WITHOUT = {
  unknown_user: "this user is new, so nothing is personalised yet",
  state_unavailable: "user history is away, so nothing is personalised",
  narrow_beam: "the service is busy, so fewer candidates were looked at",
  inference_fallback: "the model server is away, so this process answered",
};

function show(answer, moves) {
  const count = answer.items.length;
  const found = count === 0 ? "Nothing found. Try fewer filters or other words." : `${count} ${count === 1 ? "result" : "results"}`;
  const notes = answer.degraded.map((reason) => WITHOUT[reason] ?? reason);
  const told = count ? `${found} in ${Math.round(answer.timings_ms.total)} ms` : found;
  say([told, `variant ${answer.variant}`, ...notes, ...summary(moves)].join(" · "));
  results.replaceChildren(...answer.items.map((item) => card(item, answer, moves)));
  for (const [at, node] of [...results.children].entries()) watch(node, answer.items[at], answer);
  showFacets(answer.facets, search);
  explain(answer);
}

function fail(error) {
  clear();
  const problem = error.problem;
  if (!problem) return say("The service cannot be reached. Please try again.", true);
  if (problem.status >= 500) return say(`Something went wrong. Please try again. (request ${problem.instance})`, true);
  const faults = (problem.errors ?? []).map((fault) => `${fault.field}: ${fault.message}`);
  say(faults.join(" · ") || problem.detail, true);
}

function card(item, answer, moves) {
  const node = byId("card").content.cloneNode(true);
  const set = (name, text) => (node.querySelector(name).textContent = text);
  const group = item.category.slice(0, 2).join();
  const share = Math.exp(item.score - answer.items[0].score);
  set(".rank", item.rank);
  mark(node.querySelector(".moved"), moves?.get(item.item_id) ?? 0);
  set(".tile", (item.brand ?? item.title).trim().charAt(0).toUpperCase());
  set(".title", item.title);
  set(".maker", item.brand ?? "");
  set(".path", item.category.join(" › "));
  set(".number", item.score.toFixed(2));
  set(".price", item.price === null ? "" : item.price.toLocaleString(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 }));
  set(".stock", item.in_stock ? "in stock" : "sold out");
  set(".sid", `SID ${item.sid.join("·")}`);
  node.querySelector(".sid").hidden = !byId("about").open;
  node.querySelector(".stock").classList.toggle("out", !item.in_stock);
  node.querySelector(".tile").style.setProperty("--hue", [...group].reduce((sum, c) => (sum * 31 + c.codePointAt(0)) % 360, 7));
  node.querySelector(".fill").style.setProperty("--share", share);
  const button = node.querySelector(".item");
  button.addEventListener("click", () => choose(button, item, answer));
  return node;
}

async function choose(button, item, answer) {
  button.classList.add("chosen");
  if (!user()) return say("Enter a user id to have clicks remembered.");
  try {
    await clicked(item, answer);
    say(`Click on “${item.title}” remembered for ${user()}.`);
    again.hidden = false;
  } catch (error) {
    say(`The click was not remembered: ${error.message}`, true);
  }
}

function onKey(event) {
  const field = event.target.matches("input, select, textarea");
  if (event.key === "/" && !field) {
    event.preventDefault();
    query.select();
    query.focus();
    return;
  }
  const steps = { ArrowDown: 1, ArrowUp: -1 };
  const items = [...results.querySelectorAll(".item")];
  const at = items.indexOf(document.activeElement);
  if (!(event.key in steps) || items.length === 0 || (at < 0 && event.target !== query)) return;
  event.preventDefault();
  const next = at + steps[event.key];
  (next < 0 ? query : items[Math.min(next, items.length - 1)]).focus();
}

async function fill() {
  const [catalog, { variants }] = await Promise.all([call("/v1/catalog"), call("/v1/variants")]);
  byId("size").textContent = `${catalog.items.toLocaleString()} items in this catalog`;
  byId("category").append(...catalog.categories.map((name) => new Option(name, name)));
  byId("variant").append(...variants.map(({ name, share }) => new Option(`${name} (${Math.round(share * 100)} %)`, name)));
  byId("examples").replaceChildren(...catalog.examples.map(chip));
}

function chip(text) {
  const button = element("button", text);
  button.type = "button";
  button.addEventListener("click", () => {
    query.value = text;
    query.focus();
    search();
  });
  return button;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
again.addEventListener("click", () => search());
byId("forget").addEventListener("click", () => {
  forget().then(() => search(), (error) => say(`The history was not forgotten: ${error.message}`, true));
});
for (const id of [...Object.keys(FIELDS), "in-stock", "user"]) byId(id).addEventListener("change", () => query.value.trim() && search());
query.addEventListener("search", () => query.value || idle());
byId("about").addEventListener("toggle", () => {
  for (const sid of results.querySelectorAll(".sid")) sid.hidden = !byId("about").open;
});
document.addEventListener("keydown", onKey);
window.addEventListener("popstate", fromAddress);
if (matchMedia("(max-width: 760px)").matches) byId("panel").open = false;
greet();
fill().catch(fail).finally(fromAddress);

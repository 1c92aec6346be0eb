// The search page: one form, one list. Talks to this service only; all text enters the page as text.

const byId = (id) => document.getElementById(id);
const form = byId("form"), query = byId("query"), status = byId("status"), results = byId("results");
const FIELDS = { user: "user_id", variant: "variant", category: "category", "price-min": "price_min", "price-max": "price_max" };
let latest = 0; // the number of the newest search; older answers are dropped

async function call(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.detail), { problem: body });
  return body;
}

function post(path, body, headers = {}) {
  const all = { "Content-Type": "application/json", ...headers };
  return call(path, { method: "POST", headers: all, body: JSON.stringify(body), keepalive: path === "/v1/events" });
}

const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));

function asked() {
  const filters = {
    category: byId("category").value || undefined,
    price_min: number("price-min"),
    price_max: number("price-max"),
    in_stock: byId("in-stock").checked || undefined,
  };
  return { query: query.value, user_id: byId("user").value.trim() || undefined, limit: 20, filters, explain: true };
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
}

function idle() {
  latest += 1;
  document.body.removeAttribute("aria-busy");
  results.replaceChildren();
  byId("about").hidden = true;
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
  const forced = byId("variant").value;
  try {
    const answer = await post("/v1/search", asked(), forced ? { "X-OneSearch-Variant": forced } : {});
    if (mine === latest) show(answer);
  } catch (error) {
    if (mine === latest) fail(error);
  } finally {
    if (mine === latest) document.body.removeAttribute("aria-busy");
  }
}

const WITHOUT = {
  unknown_user: "this user is new, so nothing is personalised yet",
  state_unavailable: "user history is away, so nothing is personalised",
};

function show(answer) {
  const count = answer.items.length;
  const found = count === 0 ? "Nothing found. Try fewer filters or other words." : `${count} ${count === 1 ? "result" : "results"}`;
  const notes = answer.degraded.map((reason) => WITHOUT[reason] ?? reason);
  say([count ? `${found} in ${Math.round(answer.timings_ms.total)} ms` : found, ...notes].join(" · "));
  results.replaceChildren(...answer.items.map((item) => card(item, answer)));
  explain(answer);
}

function fail(error) {
  results.replaceChildren();
  byId("about").hidden = true;
  const problem = error.problem;
  if (!problem) return say("The service cannot be reached. Please try again.", true);
  if (problem.status >= 500) return say(`Something went wrong. Please try again. (request ${problem.instance})`, true);
  const faults = (problem.errors ?? []).map((fault) => `${fault.field}: ${fault.message}`);
  say(faults.join(" · ") || problem.detail, true);
}

function card(item, answer) {
  const node = byId("card").content.cloneNode(true);
  const set = (name, text) => (node.querySelector(name).textContent = text);
  const group = item.category.slice(0, 2).join();
  const share = Math.exp(item.score - answer.items[0].score);
  set(".rank", item.rank);
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
  const user = byId("user").value.trim();
  if (!user) return say("Enter a user id to have clicks remembered.");
  const event = { type: "click", item_id: item.item_id, user_id: user, request_id: answer.request_id, query: answer.query };
  try {
    await post("/v1/events", event);
    say(`Click on “${item.title}” remembered for ${user}. Search again to see what changes.`);
  } catch (error) {
    say(`The click was not remembered: ${error.message}`, true);
  }
}

function explain(answer) {
  const how = answer.explain;
  const facts = {
    Variant: answer.variant,
    Model: `${answer.model_version} (catalog ${answer.catalog_version})`,
    "Query SID": how.query_sid.join("·"),
    Keywords: answer.keywords.join(", ") || "none",
    "Beams per level": how.beams.join(" → "),
    "Eligible items": how.eligible.toLocaleString(),
    "History used": `${how.history.queries} queries, ${how.history.clicks} clicks, ${how.history.long} long-term`,
    Request: answer.request_id,
  };
  const pair = ([name, value]) => [["dt", name], ["dd", value]].map(([tag, text]) => element(tag, text));
  byId("facts").replaceChildren(...Object.entries(facts).flatMap(pair));
  const { total, ...stages } = answer.timings_ms;
  byId("stages").replaceChildren(...Object.entries({ ...stages, total }).map(([name, spent]) => stage(name, spent, total)));
  byId("about").hidden = false;
}

function stage(name, spent, total) {
  const row = element("div"), track = element("span"), fill = element("span");
  track.className = "track";
  fill.className = "fill";
  fill.style.setProperty("--share", total ? Math.min(1, spent / total) : 0);
  track.append(fill);
  row.append(element("span", name), track, element("span", `${spent.toFixed(2)} ms`));
  return row;
}

function element(tag, text = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
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
for (const id of [...Object.keys(FIELDS), "in-stock"]) byId(id).addEventListener("change", () => query.value.trim() && search());
query.addEventListener("search", () => query.value || idle());
byId("about").addEventListener("toggle", () => {
  for (const sid of results.querySelectorAll(".sid")) sid.hidden = !byId("about").open;
});
document.addEventListener("keydown", onKey);
window.addEventListener("popstate", fromAddress);
if (matchMedia("(max-width: 760px)").matches) byId("panel").open = false;
fill().catch(fail).finally(fromAddress);

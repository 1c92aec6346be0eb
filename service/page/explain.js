// How an answer was made: what the model read, how wide it searched, what it went without, and the time of each stage.

import { byId, element } from "./api.js";

export function explain(answer) {
  const how = answer.explain, arms = Object.entries(how.experiments).map((pair) => pair.join(": "));
  const facts = {
    Variant: [answer.variant, ...arms].join(" · "),
    Model: `${answer.model_version} (catalog ${answer.catalog_version})`,
    "Query SID": how.query_sid.join("·"),
    Keywords: answer.keywords.length ? `${answer.keywords.join(", ")} (${SOURCES[how.keyword_source]})` : "none",
    "History used": `${how.history.queries} queries, ${how.history.clicks} clicks, ${how.history.orders} orders`,
    "Beam width": `${how.options.width}, scores by ${how.options.score}`,
    "Beams per level": how.beams.join(" → "),
    "Eligible items": how.eligible.toLocaleString(),
    Degraded: answer.degraded.join(", ") || "nothing",
    Request: answer.request_id,
  };
  const pair = ([name, value]) => [element("dt", name), element("dd", value)];
  byId("facts").replaceChildren(...Object.entries(facts).flatMap(pair));
  const { total, ...stages } = answer.timings_ms;
  byId("stages").replaceChildren(...Object.entries({ ...stages, total }).map(([name, spent]) => stage(name, spent, total)));
  byId("about").hidden = false;
}

const SOURCES = { user: "made for this user", query: "made for this query", none: "from the dictionary" };

function stage(name, spent, total) {
  const row = element("div"), track = element("span", "", "track"), fill = element("span", "", "fill");
  fill.style.setProperty("--share", total ? Math.min(1, spent / total) : 0);
  track.append(fill);
  row.append(element("span", name), track, element("span", `${spent.toFixed(2)} ms`));
  return row;
}

// The API for people, drawn from /openapi.json; no assets from other hosts.

const byId = (id) => document.getElementById(id);

function element(tag, text = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = className;
  return node;
}

function resolved(schema, document) {
  const name = schema?.$ref?.split("/").at(-1);
  return name ? document.components.schemas[name] : (schema ?? {});
}

function kind(schema, document) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map((option) => kind(option, document)).join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const limits = [["minimum", "≥"], ["maximum", "≤"], ["maxLength", "length ≤"], ["maxItems", "items ≤"]];
  const bounds = limits.filter(([key]) => key in schema).map(([key, sign]) => `${sign} ${schema[key]}`);
  const items = schema.type === "array" ? ` of ${kind(schema.items ?? {}, document)}` : "";
  return [`${schema.type ?? "any"}${items}`, ...bounds].join(", ");
}

function table(rows) {
  const body = element("table");
  for (const cells of rows) {
    const row = body.insertRow();
    for (const [i, text] of cells.entries()) row.insertCell().append(element(i ? "span" : "code", text));
  }
  return body;
}

function fields(schema, document, prefix = "") {
  const own = resolved(schema, document);
  return Object.entries(own.properties ?? {}).flatMap(([name, field]) => {
    const required = own.required?.includes(name) ? "required" : "";
    const nested = [field, ...(field.anyOf ?? []), field.items ?? {}].find((part) => part.$ref);
    const row = [prefix + name, kind(field, document), [required, field.description ?? ""].filter(Boolean).join("; ")];
    return [row, ...(nested ? fields(nested, document, `${prefix}${name}.`) : [])];
  });
}

function example(method, path, schema, document) {
  const url = location.origin + path.replace("{item_id}", "17") + (method === "get" && path === "/v1/search" ? "?q=running+shoes" : "");
  const [given] = resolved(schema, document).examples ?? [];
  const body = given ? ` \\\n  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(given)}'` : "";
  return `curl '${url}'${body}`;
}

function drawn(method, path, call, document) {
  const details = element("details", "", "call"), summary = element("summary"), inside = element("div");
  summary.append(element("span", method.toUpperCase(), "verb"), element("code", path), element("span", call.summary ?? "", "hint"));
  const add = (title, ...nodes) => inside.append(element("h3", title), ...nodes);
  const schema = call.requestBody?.content["application/json"]?.schema;
  inside.append(element("p", call.description ?? "", "hint"));
  if (call.parameters?.length) {
    const row = (p) => [p.name, `${p.in}: ${kind(p.schema, document)}`, [p.required ? "required" : "", p.description ?? ""].filter(Boolean).join("; ")];
    add("Parameters", table(call.parameters.map(row)));
  }
  if (schema) add("Body", table(fields(schema, document)));
  for (const [code, answer] of Object.entries(call.responses).filter(([code]) => code < 300)) {
    const rows = fields(answer.content?.["application/json"]?.schema ?? {}, document);
    if (rows.length) add(`Answer ${code}`, table(rows));
  }
  const problems = Object.entries(call.responses).filter(([code]) => code >= 400);
  if (problems.length) add("Problems", table(problems.map(([code, answer]) => [code, answer.description])));
  add("Try", element("pre", example(method, path, schema, document)));
  details.append(summary, inside);
  return details;
}

async function draw() {
  const description = await (await fetch("/openapi.json")).json();
  byId("title").textContent = `${description.info.title} ${description.info.version}`;
  byId("intro").textContent = description.info.description;
  const groups = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, call] of Object.entries(methods)) {
      const tag = call.tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(drawn(method, path, call, description));
    }
  }
  for (const [tag, calls] of groups) {
    const section = element("section");
    section.append(element("h2", tag[0].toUpperCase() + tag.slice(1)), ...calls);
    byId("calls").append(section);
  }
}

draw().catch(() => (byId("intro").textContent = "The description cannot be read."));

// How the page talks to this service, and to nothing else.

export async function call(path, options) {
  const response = await fetch(path, options);
  const body = response.status === 204 ? null : await response.json();
  if (!response.ok) throw Object.assign(new Error(body.detail), { problem: body });
  return body;
}

// Events outlive the page that sends them.
export function post(path, body, headers = {}) {
  const all = { "Content-Type": "application/json", ...headers };
  return call(path, { method: "POST", headers: all, body: JSON.stringify(body), keepalive: path === "/v1/events" });
}

export const byId = (id) => document.getElementById(id);

export function element(tag, text = "", type = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = type;
  return node;
}

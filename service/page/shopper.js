// Who searches in this browser, and what the service is told of it: items seen and items clicked.

import { byId, call, post } from "./api.js";

const KEY = "onesearch-user", SEEN_SHARE = 0.5, SEND_MS = 400;
const field = byId("user");
let waiting = []; // impressions not sent yet
let timer = 0;

export const user = () => field.value.trim();

const fresh = () => `guest-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;

function become(id) {
  field.value = id;
  localStorage.setItem(KEY, id);
}

// An id of its own for every browser; an empty one, once chosen, stays empty.
export function greet() {
  become(localStorage.getItem(KEY) ?? fresh());
}

// One event id for an item of an answer: sent twice it counts once.
function event(type, item, answer) {
  const { request_id, query, variant } = answer;
  return {
    type, item_id: item.item_id, user_id: user(), event_id: `${request_id}-${type}-${item.item_id}`,
    request_id, query, variant, price: item.price ?? undefined,
  };
}

export const clicked = (item, answer) => post("/v1/events", event("click", item, answer));

export async function forget() {
  if (user()) await call(`/v1/users/${encodeURIComponent(user())}`, { method: "DELETE" });
}

const shown = new WeakMap(); // cards: their item and answer
const watcher = new IntersectionObserver((entries) => {
  for (const { target, intersectionRatio } of entries) {
    if (intersectionRatio < SEEN_SHARE) continue;
    watcher.unobserve(target);
    if (user()) waiting.push(event("impression", ...shown.get(target)));
  }
  clearTimeout(timer);
  timer = setTimeout(send, SEND_MS);
}, { threshold: SEEN_SHARE });

// Tell the service of a card once half of it has been on the screen.
export function watch(card, item, answer) {
  shown.set(card, [item, answer]);
  watcher.observe(card);
}

async function send() {
  const events = waiting;
  waiting = [];
  // A lost impression costs a count, and the shopper nothing.
  if (events.length) await post("/v1/events", { events }).catch(() => {});
}

field.addEventListener("change", () => become(user()));
byId("new-user").addEventListener("click", () => {
  become(fresh());
  field.dispatchEvent(new Event("change"));
});
window.addEventListener("pagehide", send);

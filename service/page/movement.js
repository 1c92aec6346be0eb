// What became of every item's rank since the previous answer to the same search.

const previous = new Map(); // a search: ranks by item id

// The places each item went up since, "new" for one that was not there; null after the first answer to a search.
export function movement(search, items) {
  const key = JSON.stringify([search.query.trim().toLowerCase(), search.filters]), before = previous.get(key);
  previous.set(key, new Map(items.map((item) => [item.item_id, item.rank])));
  if (!before) return null;
  return new Map(items.map(({ item_id, rank }) => [item_id, before.has(item_id) ? before.get(item_id) - rank : "new"]));
}

// An arrow for the eye, words for whoever points at it or listens.
export function mark(node, places) {
  const fresh = places === "new", up = places > 0;
  node.textContent = fresh ? "new" : `${up ? "▲" : "▼"} ${Math.abs(places)}`;
  node.title = fresh ? "not in the previous answer" : `${up ? "up" : "down"} ${Math.abs(places)} since the previous answer`;
  node.setAttribute("aria-label", node.title);
  node.classList.toggle("down", places < 0);
  node.hidden = !places;
}

export function summary(moves) {
  if (!moves) return [];
  const all = [...moves.values()], count = (test) => all.filter(test).length;
  const [fresh, up, down] = [count((m) => m === "new"), count((m) => m > 0), count((m) => m < 0)];
  const told = [[up, "up"], [down, "down"], [fresh, "new"]].filter(([n]) => n).map(([n, what]) => `${n} ${what}`);
  return [told.length ? `since your last search: ${told.join(", ")}` : "same order as in your last search"];
}

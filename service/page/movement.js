// What became of every item's rank since the previous answer to the same search.

const previous = new Map(); // a search: ranks by item id

// The places each item went up since, "new" for one that was not there; null after the first answer to a search.
export function movement(search, items) {
  const key = JSON.stringify([search.query.trim().toLowerCase(), search.filters]), before = previous.get(key);
  previous.set(key, new Map(items.map((item) => [item.item_id, item.rank])));
  if (!before) return null;
  return new Map(items.map(({ item_id, rank }) => [item_id, before.has(item_id) ? before.get(item_id) - rank : "new"]));
}

export function mark(node, places) {
  node.textContent = places === "new" ? "new" : places > 0 ? `▲ ${places}` : places < 0 ? `▼ ${-places}` : "";
  node.title = places === "new" ? "not in the previous answer" : `rank in the previous answer: ${places > 0 ? "lower" : "higher"}`;
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

// Elements. Text is only ever set as text: the page's policy (Trusted Types) forbids the browser to parse any as HTML.

export const byId = (id) => document.getElementById(id);

/** A new element with properties and children; strings among these become text. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Sets a text only where it differs, so that a live region stays silent and a selection stays. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Makes the children of `host` those of `items`. An item that stays keeps its element, and so the focus.
 * `make(item)` gives a new element, `update(node, item)` brings it up to date.
 */
export function syncChildren(host, items, keyOf, make, update) {
  const before = new Map([...host.children].map((node) => [node.dataset.key, node]));
  items.forEach((item, index) => {
    const key = String(keyOf(item));
    const node = before.get(key) ?? make(item);
    before.delete(key);
    node.dataset.key = key;
    update(node, item);
    if (host.children[index] !== node) host.insertBefore(node, host.children[index] ?? null);
  });
  for (const node of before.values()) node.remove();
}

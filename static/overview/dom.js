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
  const focused = document.activeElement;
  const wanted = new Set(items.map((item) => String(keyOf(item))));
  const present = new Map([...host.children].map((node) => [node.dataset.key, node]));
  for (const [key, node] of present) if (!wanted.has(key)) node.remove();
  items.forEach((item, index) => {
    const key = String(keyOf(item));
    const node = present.get(key) ?? make(item);
    node.dataset.key = key;
    update(node, item);
    if (host.children[index] !== node) host.insertBefore(node, host.children[index] ?? null);
  });
  if (host.contains(focused) && document.activeElement !== focused) focused.focus({ preventScroll: true }); // was moved
}

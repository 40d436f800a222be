// The numbers: totals, classes, the lists of methods, status codes, addresses and URIs, and the chart as a table.

import { byId, element, setText, syncChildren } from "./dom.js";
import { CLASSES, formatCount, formatMoment, formatRecords, shortUri } from "./format.js";

const MOST_ENTRIES = 10; // of methods and status codes; clients may invent many

/** The largest counts, in their order, and what the others come to. */
export function largest(counts) {
  const entries = Object.entries(counts).map(([value, count]) => ({ value, count }));
  entries.sort((one, other) => other.count - one.count || (one.value < other.value ? -1 : 1));
  const others = entries.splice(MOST_ENTRIES);
  return { entries, others: others.length, rest: others.reduce((sum, { count }) => sum + count, 0) };
}

export function sumClasses(buckets) {
  return CLASSES.map((name) => ({ name, count: buckets.reduce((sum, bucket) => sum + bucket[name], 0) }));
}

export function showClasses(buckets) {
  syncChildren(
    byId("classes"),
    sumClasses(buckets),
    ({ name }) => name,
    ({ name }) => element("li", { className: `class-${name}` }),
    (node, { name, count }) => setText(node, `${name} ${formatCount(count)}`),
  );
}

/** `filters` has those that are on; `onPress(filter, value)` is called when an entry is pressed. */
export function showCounts(stats, filters, onPress) {
  const methods = largest(stats.methods);
  const statuses = largest(stats.status_codes);
  statuses.entries.sort((one, other) => one.value - other.value);
  showList(byId("methods"), withOthers(methods), stats.total, "method", filters, onPress);
  showList(byId("statuses"), withOthers(statuses), stats.total, "status_code", filters, onPress);
}

export function showTops(stats, filters, onPress) {
  const addresses = stats.top_ips.map(({ ip, count }) => ({ value: ip, count }));
  const uris = stats.top_uris.map(({ uri, count }) => ({ value: uri, count }));
  showList(byId("addresses"), addresses, stats.top_of, "ip", filters, onPress);
  showList(byId("uris"), uris, stats.top_of, null, filters, onPress);
  const note = stats.top_of < stats.total ? `Of the newest ${formatRecords(stats.top_of)}` : "";
  for (const node of document.getElementsByClassName("top-of")) setText(node, note);
}

function withOthers({ entries, others, rest }) {
  return others ? [...entries, { value: "", text: `${formatCount(others)} others`, count: rest }] : entries;
}

function showList(host, entries, of, filter, filters, onPress) {
  const make = ({ value, text }) => {
    const isButton = filter && value;
    const parts = [element("bdi", {}, text ?? shortUri(value)), element("span", { className: "count" })];
    const name = isButton ? element("button", { type: "button" }, ...parts) : element("div", {}, ...parts);
    if (isButton) name.onclick = () => onPress(filter, value);
    if (!filter) name.title = shortUri(value);
    const node = element("li", {}, name);
    if (filter === "status_code") node.className = `class-${value[0]}xx`;
    return node;
  };
  syncChildren(host, entries, ({ value }) => value, make, (node, { value, count }) => {
    const [name] = node.children;
    setText(name.lastElementChild, formatCount(count));
    name.style.setProperty("--part", `${of ? (100 * count) / of : 0}%`);
    if (name.tagName === "BUTTON") name.ariaPressed = String(filters[filter] === value);
  });
}

export function showTable(table, buckets, zone) {
  const [head] = table.tHead.rows;
  if (head.cells.length === 1) {
    head.append(...CLASSES.map((name) => element("th", { scope: "col" }, name)));
  }
  syncChildren(
    table.tBodies[0],
    buckets,
    ({ date_from }) => date_from,
    () => element("tr", {}, element("th", { scope: "row" }), ...CLASSES.map(() => element("td"))),
    (row, bucket) => {
      setText(row.cells[0], formatMoment(Date.parse(bucket.date_from), zone));
      CLASSES.forEach((name, index) => setText(row.cells[index + 1], formatCount(bucket[name])));
    },
  );
}

/** What the canvas shows, in a sentence. */
export function describeChart(buckets) {
  const classes = sumClasses(buckets).filter(({ count }) => count);
  const sums = classes.map(({ name, count }) => `${formatCount(count)} of class ${name}`).join(", ");
  return `Records per minute in ${buckets.length} bars by class of status: ${sums || "none"}. The table below has all.`;
}

// What is shown: the view, which the address bar holds whole, and the window of time that it means at a moment.
//
//   ?window=15m | 1h | 1d           the time up to now; 1h if nothing is said
//   ?date_from=...&date_to=...      a window of one's own, in ISO 8601; no offset means UTC, as in the API
//   &method= &status_code= &ip=     filters, named as in the API
//   &zone=local                     times as the reader's clock has them; otherwise UTC
//
// Nothing here touches the page or reads a clock. Moments are milliseconds since 1970.

const MINUTE = 60_000;

export const DEFAULT_WINDOW = "1h";
// Steps are whole minutes, which the backend has counted already; edges are whole steps, so that bars stand still.
export const WINDOWS = {
  "15m": { label: "15 minutes", length: 15 * MINUTE, step: MINUTE },
  "1h": { label: "Hour", length: 60 * MINUTE, step: MINUTE },
  "1d": { label: "Day", length: 1440 * MINUTE, step: 15 * MINUTE },
};
export const FILTERS = {
  method: { label: "Method", pattern: /^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}$/ },
  status_code: { label: "Status", pattern: /^[1-5][0-9][0-9]$/ },
  ip: { label: "Address", pattern: /^[0-9A-Fa-f:.]{2,45}$/ },
};
const MOST_BARS = 120;
const FEWEST_BARS = 40;
const MOMENT = /^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?$/;

/** Milliseconds, or NaN for what is no date. Date.parse alone would take a time without an offset for local. */
export function parseMoment(text) {
  const found = MOMENT.exec(text);
  return found ? Date.parse(text.replace(" ", "T") + (found[1] && !found[4] ? "Z" : "")) : NaN;
}

/** The view that a query means, and a sentence for each part of it that means nothing. */
export function parseView(query) {
  const given = new URLSearchParams(query);
  const view = { window: given.get("window") ?? DEFAULT_WINDOW, from: null, to: null, filters: {}, zone: "utc" };
  const problems = [];
  if (given.has("date_from") || given.has("date_to")) {
    const [from, to] = ["date_from", "date_to"].map((name) => parseMoment(given.get(name) ?? ""));
    if (from < to) Object.assign(view, { window: null, from, to });
    else problems.push("In the address date_from must be a date such as 2026-11-23T18:00Z, and date_to a later one.");
  }
  if (view.window !== null && !Object.hasOwn(WINDOWS, view.window)) {
    problems.push(`In the address window must be one of ${Object.keys(WINDOWS).join(", ")}.`);
    view.window = DEFAULT_WINDOW;
  }
  for (const [name, { label, pattern }] of Object.entries(FILTERS)) {
    const value = given.get(name);
    if (value !== null && pattern.test(value)) view.filters[name] = value;
    else if (value !== null) problems.push(`In the address ${value.slice(0, 40)} is no ${label.toLowerCase()}.`);
  }
  if (given.get("zone") === "local") view.zone = "local";
  return { view, problems };
}

/** The query of a view, as short as it can be: "" for the page as it opens. */
export function addressOf(view) {
  const query = new URLSearchParams();
  if (view.window === null) {
    query.set("date_from", new Date(view.from).toISOString());
    query.set("date_to", new Date(view.to).toISOString());
  } else if (view.window !== DEFAULT_WINDOW) query.set("window", view.window);
  for (const [name, value] of Object.entries(view.filters)) query.set(name, value);
  if (view.zone === "local") query.set("zone", "local");
  return query.size ? `?${query}`.replaceAll("%3A", ":") : "";
}

/** The window of time that a view means now, in bars. One that moves has no end for the lines that come in. */
export function frameOf(view, now) {
  if (view.window === null) {
    const { from, to } = view;
    return { from, to, buckets: barsOf(to - from), moves: false };
  }
  const { length, step } = WINDOWS[view.window];
  const to = (Math.floor(now / step) + 1) * step;
  return { from: to - length, to, buckets: length / step, moves: true };
}

/** What is left of a window when records before `keptFrom`, a date with all its decimals, have expired. */
export function keptPart(frame, keptFrom) {
  return Date.parse(keptFrom) >= frame.from ? { ...frame, from: Date.parse(keptFrom), date_from: keptFrom } : frame;
}

/** How many bars a window has: of whole minutes each where that can be. */
function barsOf(length) {
  if (length % MINUTE === 0 && length <= FEWEST_BARS * MINUTE && length >= 5 * MINUTE) return length / MINUTE;
  for (let bars = MOST_BARS; bars >= FEWEST_BARS; bars--) if (length % (bars * MINUTE) === 0) return bars;
  return 60;
}

/** The parameters that ask the API for a window with the view's filters. */
export function queryOf(frame, filters, more = {}) {
  const { from, to, date_from = new Date(from).toISOString() } = frame;
  return new URLSearchParams({ date_from, date_to: new Date(to).toISOString(), ...filters, ...more });
}

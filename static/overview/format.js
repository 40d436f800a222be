// Numbers and moments as a person reads them. Times are in UTC with a Z, as the records have them, or in the reader's
// own zone with its offset: never without either.

const COUNT = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");
const LONGEST_URI = 300;

export const CLASSES = ["1xx", "2xx", "3xx", "4xx", "5xx"];

export const formatCount = (count) => COUNT.format(count);
export const formatRecords = (count) => `${formatCount(count)} ${count === 1 ? "record" : "records"}`;
export const formatShort = (count) => SHORT.format(count);
export const localZone = () => Intl.DateTimeFormat().resolvedOptions().timeZone;
export const zoneName = (zone) => (zone === "utc" ? "UTC" : `local, ${localZone()}`);

const two = (number) => String(number).padStart(2, "0");

/** A moment whose UTC members are what a clock in that zone shows. */
function shifted(moment, zone) {
  const offset = zone === "utc" ? 0 : -new Date(moment).getTimezoneOffset();
  return { clock: new Date(moment + offset * 60_000), offset };
}

function offsetName(offset, zone) {
  if (zone === "utc") return "Z";
  return `${offset < 0 ? "-" : "+"}${two(Math.floor(Math.abs(offset) / 60))}:${two(Math.abs(offset) % 60)}`;
}

/** A record's `created` with all its decimals. */
export function formatCreated(created, zone) {
  if (zone === "utc") return created;
  const { clock, offset } = shifted(Date.parse(created), zone);
  return clock.toISOString().slice(0, 19) + created.slice(19, -1) + offsetName(offset, zone);
}

/** 2026-11-23 18:43Z, with seconds where there are any. */
export function formatMoment(moment, zone) {
  const { clock, offset } = shifted(moment, zone);
  const text = clock.toISOString();
  return `${text.slice(0, 10)} ${text.slice(11, text.slice(17, 23) === "00.000" ? 16 : 19)}${offsetName(offset, zone)}`;
}

/** 18:43:46Z */
export function formatClock(moment, zone) {
  const { clock, offset } = shifted(moment, zone);
  return clock.toISOString().slice(11, 19) + offsetName(offset, zone);
}

/** What stands at the time axis: the time, the day where one begins, the year where that does. */
export function formatTick(moment, zone, step) {
  const { clock } = shifted(moment, zone);
  const text = clock.toISOString();
  const midnight = text.slice(11, 23) === "00:00:00.000";
  if (midnight && text.slice(5, 10) === "01-01") return text.slice(0, 4);
  if (midnight) return `${clock.getUTCDate()} ${MONTHS[clock.getUTCMonth()]}`;
  return text.slice(11, step < 60_000 ? 19 : 16);
}

/** A moment for an input of type datetime-local, and back. */
export function toInput(moment, zone) {
  return shifted(moment, zone).clock.toISOString().slice(0, 19);
}

export function fromInput(text, zone) {
  return zone === "utc" ? Date.parse(`${text}Z`) : Date.parse(text); // without an offset that is local
}

/** A URI that fits on the screen: up to 8 KiB are allowed. */
export function shortUri(uri) {
  return uri.length <= LONGEST_URI ? uri : `${uri.slice(0, LONGEST_URI)}… (${formatCount(uri.length)} characters)`;
}

/** How long something lasted. */
export function formatDuration(milliseconds) {
  const seconds = Math.round(milliseconds / 1000);
  return seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} minutes`;
}

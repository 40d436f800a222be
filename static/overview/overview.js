// The overview page. It uses the public API only: numbers from /api/stats, lines from /api/data and its `next` links.
//
//   address bar -> view (view.js) -> numbers: a poller and panels.js, chart.js; the first ones of a view begin
//                                      -> top lists: a poller and panels.js; they cost the backend most
//                                      -> lines: a poller, feed.js and lines.js
//
// Whatever is pressed changes the view, and the address bar with it: a view can be sent as a link, and "back" works.

import { Api, ApiError } from "./api.js";
import { Chart } from "./chart.js";
import { byId, element, setText, syncChildren } from "./dom.js";
import { Feed } from "./feed.js";
import { formatClock, formatCount, formatDuration, formatMoment, formatRecords } from "./format.js";
import { fromInput, localZone, toInput } from "./format.js";
import { Lines } from "./lines.js";
import { describeChart, showClasses, showCounts, showTable, showTops } from "./panels.js";
import { Poller, retrySeconds } from "./poller.js";
import { addressOf, FILTERS, frameOf, keptPart, parseView, queryOf, WINDOWS } from "./view.js";

const NUMBERS_SECONDS = 5;
const TOPS_SECONDS = 15;
const REST = 9; // after each of these two, times what it took: a tenth of the backend's time at most
const LONGEST_REST_SECONDS = 90; // more was no work of the backend's: this machine slept meanwhile
const TOP = 10;
const DOWNLOAD_RECORDS = 100_000; // with a token the page has to hold them all in memory
const GOOD_NEWS_SECONDS = 10; // shown for

const api = new Api();
const lines = new Lines(byId("lines"), byId("lines-state"), press);
const feed = new Feed(api, (records, skipped) => lines.add(records, skipped));
const chart = new Chart(byId("chart"), byId("tip"), (from, to) => change({ window: null, from, to }));
const numbersPoller = new Poller(guarded("numbers", gently(NUMBERS_SECONDS, pollNumbers)));
const topsPoller = new Poller(guarded("top lists", gently(TOPS_SECONDS, pollTops)));
const linesPoller = new Poller(guarded("lines", (signal) => feed.step(signal)));

let view; // what the address bar says
let numbers = null; // the last ones of this view: { stats, frame }
let keptFrom = null; // as the API says it: records before that have expired
let isPaused = false;
let problems = []; // with the address, said with the first numbers

// ---- The view -------------------------------------------------------------------------------------------------------

function readAddress() {
  ({ view, problems } = parseView(location.search));
  restart();
}

function change(changes) {
  view = { ...view, ...changes };
  problems = [];
  history.pushState(null, "", addressOf(view) || location.pathname);
  restart();
}

/** A filter is set by pressing what is shown, and taken off by pressing it again. */
function press(filter, value) {
  const { [filter]: before, ...filters } = view.filters;
  change({ filters: before === value ? filters : { ...filters, [filter]: value } });
  if (document.activeElement !== document.body) return;
  const chip = [...byId("filters").children].find((item) => item.dataset.key === `${filter} ${value}`);
  (chip?.firstElementChild ?? byId("overview")).focus(); // what was pressed has gone
}

function changeZone(zone) {
  view = { ...view, zone };
  history.pushState(null, "", addressOf(view) || location.pathname);
  showControls();
  lines.setZone(zone);
  if (numbers) showNumbers();
}

function restart() {
  numbers = null;
  stopAsking("top lists", topsPoller);
  stopAsking("lines", linesPoller);
  lines.clear();
  lines.setZone(view.zone);
  showControls();
  for (const id of ["overview", "addresses", "uris"]) byId(id).ariaBusy = "true";
  numbersPoller.restart();
}

function currentFrame() {
  return keptPart(frameOf(view, api.now()), keptFrom);
}

// ---- Asking ---------------------------------------------------------------------------------------------------------

/** Whether there may be more to come. */
async function pollNumbers(signal) {
  const frame = currentFrame();
  if (frame.from >= frame.to) throw new ApiError("refused", "all records of this window have expired");
  const stats = await api.stats(queryOf(frame, view.filters, { buckets: frame.buckets, top: 0 }), signal);
  const isFirst = numbers === null;
  numbers = { stats, frame };
  leaveSignIn();
  showNumbers();
  lines.dropBefore(frame.from);
  if (isFirst) begin();
  return frame.moves || frame.to > api.now();
}

async function pollTops(signal) {
  const frame = currentFrame();
  const stats = await api.stats(queryOf(frame, view.filters, { buckets: 1, top: TOP }), signal);
  for (const id of ["addresses", "uris"]) byId(id).ariaBusy = "false";
  showTops(stats, view.filters, press);
  return frame.moves || frame.to > api.now();
}

/** A step as one for a poller: it is done again after so many seconds, or later if it takes its time. */
function gently(seconds, step) {
  return async (signal) => {
    const began = performance.now();
    const goesOn = await step(signal);
    const rest = Math.min((REST * (performance.now() - began)) / 1000, LONGEST_REST_SECONDS);
    return goesOn ? Math.max(seconds, rest) : null;
  };
}

/** The first numbers of a view are there. */
function begin() {
  const { stats, frame } = numbers;
  byId("overview").ariaBusy = "false";
  const keptSince = formatMoment(frame.from, view.zone);
  const expired = frame.date_from ? [`Records before ${keptSince} have expired and were deleted.`] : [];
  const wrong = [...problems, ...expired];
  const filters = Object.entries(view.filters).map(([name, value]) => `${FILTERS[name].label.toLowerCase()} ${value}`);
  if (wrong.length) say(wrong.join(" "), "problem");
  else if (!outage) say([formatRecords(stats.total), ...filters].join(", "), "quiet");
  feed.begin(frame, view.filters, stats.buckets);
  topsPoller.restart();
  if (!isPaused) linesPoller.restart();
}

/** A step that is tried again when the backend is away, and says so. */
function guarded(what, step) {
  let failures = 0;
  return async (signal) => {
    try {
      const seconds = await step(signal);
      failures = 0;
      noteAnswer(what);
      return seconds;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.kind === "away") {
        failures += 1;
        noteOutage(what, error.message);
        return retrySeconds(failures, error.retryAfter, Math.random());
      }
      failures = 0;
      noteAnswer(what);
      giveUp(error);
      return null;
    }
  };
}

/** What is not asked any more cannot fail any more. */
function stopAsking(what, poller) {
  poller.stop();
  outage?.reasons.delete(what);
}

/** Asking the same again is of no use. */
function giveUp(error) {
  if (error.kind === "token") askForToken();
  else if (error.kind === "gone" && error.keptFrom !== keptFrom) {
    ({ keptFrom } = error);
    restart();
  } else say(`Nothing to show: ${error.message}`, "problem");
}

// ---- What is said ---------------------------------------------------------------------------------------------------

let outage = null; // { since, reasons: what fails and why }
let newsTimer = null;

/** Read out by a screen reader, hence said once and not at each poll. kind: "problem", "good", or "quiet": not seen. */
function say(text, kind) {
  clearTimeout(newsTimer);
  byId("status").className = kind;
  setText(byId("status"), text);
  if (kind === "good") newsTimer = setTimeout(() => (byId("status").className = "quiet"), GOOD_NEWS_SECONDS * 1000);
}

function noteOutage(what, reason) {
  outage ??= { since: api.now(), reasons: new Map() };
  outage.reasons.set(what, reason);
  const [first] = outage.reasons.values();
  const since = formatClock(outage.since, view.zone);
  say(`No usable answer from the backend since ${since}: ${first}. Retrying.`, "problem");
}

function noteAnswer(what) {
  outage?.reasons.delete(what);
  if (outage?.reasons.size !== 0) return;
  say(`The backend answers again, after ${formatDuration(api.now() - outage.since)}.`, "good");
  outage = null;
}

// ---- What is shown --------------------------------------------------------------------------------------------------

function showControls() {
  const own = { key: "own", label: "Custom", isOn: view.window === null, press: openOwn };
  const windows = Object.entries(WINDOWS).map(([key, { label }]) => {
    return { key, label, isOn: view.window === key, press: () => change({ window: key, from: null, to: null }) };
  });
  showChoice(byId("windows"), [...windows, own]);
  showChoice(byId("zones"), [
    { key: "utc", label: "UTC", isOn: view.zone === "utc", press: () => changeZone("utc") },
    { key: "local", label: "Local time", isOn: view.zone === "local", press: () => changeZone("local") },
  ]);
  for (const node of document.getElementsByClassName("zone")) {
    setText(node, view.zone === "utc" ? "(UTC)" : `(local time, ${localZone()})`);
  }
  showOwn(view.window === null ? view : null);
  byId("curl").hidden = true;
  showFilters();
  showDownload();
}

function showChoice(group, choices) {
  const make = ({ label }) => element("button", { type: "button" }, label);
  syncChildren(group, choices, ({ key }) => key, make, (button, choice) => {
    button.ariaPressed = String(choice.isOn);
    button.onclick = choice.press;
  });
}

function showFilters() {
  syncChildren(
    byId("filters"),
    Object.entries(view.filters),
    ([name, value]) => `${name} ${value}`,
    ([name, value]) => {
      const text = `${FILTERS[name].label} ${value}`;
      const cross = element("span", { ariaHidden: "true" }, " ✕");
      const button = element("button", { type: "button", title: `Remove the filter ${text}` }, text, cross);
      button.onclick = () => press(name, value);
      return element("li", {}, button);
    },
    () => {},
  );
}

function showNumbers() {
  const { stats, frame } = numbers;
  setText(byId("total"), formatCount(stats.total));
  const [from, to] = [frame.from, frame.to].map((moment) => formatMoment(moment, view.zone));
  setText(byId("frame"), `${from} to ${to}${frame.moves ? ", the last bar is still filling" : ""}`);
  setText(byId("updated"), `Updated ${formatClock(api.now(), view.zone)}`);
  showClasses(stats.buckets);
  chart.show(stats.buckets, view.zone);
  byId("chart").ariaLabel = describeChart(stats.buckets);
  showCounts(stats, view.filters, press);
  if (byId("as-table").open) showTable(byId("as-table").querySelector("table"), stats.buckets, view.zone);
  showDownload();
}

// ---- A window of one's own ------------------------------------------------------------------------------------------

/** Opens the form with a window's dates, or closes it. */
function showOwn(frame) {
  byId("own").hidden = !frame;
  byId("windows").lastElementChild.ariaExpanded = String(Boolean(frame));
  if (frame) fillOwn(frame);
}

function openOwn() {
  showOwn(byId("own").hidden || view.window === null ? currentFrame() : null);
  if (!byId("own").hidden) byId("own-from").focus();
}

function fillOwn({ from, to }) {
  byId("own-from").value = toInput(from, view.zone);
  byId("own-to").value = toInput(to, view.zone);
  setText(byId("own-problem"), "");
}

function chooseOwn(event) {
  event.preventDefault();
  const [from, to] = ["own-from", "own-to"].map((id) => fromInput(byId(id).value, view.zone));
  if (from < to) change({ window: null, from, to });
  else setText(byId("own-problem"), "The first date must be earlier than the second one.");
}

// ---- Download -------------------------------------------------------------------------------------------------------

/** Without a token the browser streams it to disk by itself; a link cannot bring one. */
function showDownload() {
  byId("download").href = downloadAddress();
  byId("download").download = downloadName();
  byId("download").hidden = api.hasToken;
  byId("fetch").hidden = !api.hasToken;
}

function downloadAddress(more = {}) {
  return `api/data?${queryOf(currentFrame(), view.filters, { format: "ndjson", ...more })}`;
}

function downloadName() {
  const { from, to } = currentFrame();
  const [first, last] = [from, to].map((moment) => new Date(moment).toISOString().slice(0, 19).replaceAll(/[-:]/g, ""));
  return `records-${first}Z-${last}Z.ndjson`;
}

async function fetchRecords() {
  const button = byId("fetch");
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  try {
    const blob = await api.download(downloadAddress({ limit: DOWNLOAD_RECORDS }));
    saveAs(downloadName(), blob);
    const count = (await blob.text()).split("\n").length - 1;
    showCurl(count);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.kind === "token") askForToken();
    else say(`The download failed: ${error.message}.`, "problem");
  } finally {
    button.ariaDisabled = "false";
  }
}

function saveAs(name, blob) {
  const href = URL.createObjectURL(blob);
  element("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000); // the browser has begun to save it by then
}

function showCurl(count) {
  const isAll = count < DOWNLOAD_RECORDS;
  const first = `Saved the first ${formatRecords(count)}, as many as a page can take.`;
  say(isAll ? `Saved ${formatRecords(count)}.` : first, isAll ? "good" : "quiet");
  byId("curl").hidden = isAll;
  setText(byId("curl-says"), `${first} For all of them, with API_TOKEN set in your shell:`);
  const address = new URL(downloadAddress(), document.baseURI).href.replaceAll("'", "%27");
  const command = `curl --fail -H "Authorization: Bearer $API_TOKEN" -o records.ndjson \\\n  '${address}'`;
  setText(byId("curl").querySelector("code"), command);
}

// ---- The token ------------------------------------------------------------------------------------------------------

function askForToken() {
  numbersPoller.stop();
  stopAsking("top lists", topsPoller);
  stopAsking("lines", linesPoller);
  setText(byId("sign-in-problem"), api.hasToken ? "The backend does not accept this token." : "");
  say("", "quiet");
  byId("overview").hidden = true;
  byId("sign-in").hidden = false;
  byId("token").value = "";
  byId("token").focus();
}

function signIn(event) {
  event.preventDefault();
  const problem = api.setToken(byId("token").value.trim());
  setText(byId("sign-in-problem"), problem);
  if (!problem) restart();
}

function leaveSignIn() {
  if (byId("sign-in").hidden) return;
  byId("sign-in").hidden = true;
  byId("overview").hidden = false;
  byId("overview").focus();
}

// ---- Start ----------------------------------------------------------------------------------------------------------

function togglePause() {
  isPaused = !isPaused;
  setText(byId("pause"), isPaused ? "Resume" : "Pause");
  if (isPaused) stopAsking("lines", linesPoller);
  else if (numbers) linesPoller.restart();
}

byId("own").onsubmit = chooseOwn;
byId("sign-in").onsubmit = signIn;
byId("fetch").onclick = fetchRecords;
byId("pause").onclick = togglePause;
byId("as-table").ontoggle = () => numbers && showNumbers();
addEventListener("popstate", readAddress);
readAddress();

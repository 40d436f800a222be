// The list of newest lines on the screen: the newest on top, a bounded number. While a pointer is over it or the focus
// is in it, it stands still, and what comes in waits: nobody can press a button that moves.

import { element } from "./dom.js";
import { formatCount, formatCreated, shortUri } from "./format.js";

const MOST_LINES = 100;

export class Lines {
  #list;
  #state;
  #onPress;
  #zone = "utc";
  #waiting = []; // in their order
  #note = "";

  /** `onPress(filter, value)` is called for a method, status or address that was pressed. */
  constructor(list, state, onPress) {
    this.#list = list;
    this.#state = state;
    this.#onPress = onPress;
    for (const event of ["mouseleave", "focusout"]) list.addEventListener(event, () => setTimeout(() => this.#flush()));
  }

  clear() {
    this.#list.replaceChildren();
    this.#waiting = [];
    this.#note = "";
    this.#say();
  }

  setZone(zone) {
    this.#zone = zone;
    this.#list.dataset.zone = zone;
    for (const time of this.#list.getElementsByTagName("time")) time.textContent = formatCreated(time.dateTime, zone);
  }

  /** Records in their order; `skipped`: they do not follow those shown before, which go. */
  add(records, skipped) {
    if (skipped) {
      this.clear();
      this.#note = "Lines come in faster than they can be shown; some were left out.";
    }
    this.#waiting = [...this.#waiting, ...records].slice(-MOST_LINES);
    this.#flush();
  }

  /** Those before that moment have left the window. */
  dropBefore(moment) {
    const isOld = (line) => Date.parse(line.firstElementChild.dateTime) < moment;
    while (!this.#isHeld && this.#list.lastElementChild && isOld(this.#list.lastElementChild)) {
      this.#list.lastElementChild.remove();
    }
  }

  get #isHeld() {
    return this.#list.childElementCount > 0 && this.#list.matches(":hover, :focus-within");
  }

  #flush() {
    if (!this.#isHeld) {
      this.#list.prepend(...this.#waiting.splice(0).reverse().map((record) => this.#lineOf(record)));
      while (this.#list.childElementCount > MOST_LINES) this.#list.lastElementChild.remove();
    }
    this.#say();
  }

  #say() {
    const { length } = this.#waiting;
    const count = `${formatCount(length)}${length < MOST_LINES ? "" : " or more"}`;
    this.#state.textContent = (length ? `Standing still; new: ${count}. ` : "") + this.#note;
  }

  #lineOf({ created, log }) {
    const button = (name, text) =>
      element("button", { type: "button", title: `Show only ${text}`, onclick: () => this.#onPress(name, text) }, text);
    const status = button("status_code", String(log.status_code));
    status.className = `class-${status.textContent[0]}xx`;
    return element(
      "li",
      {},
      element("time", { dateTime: created }, formatCreated(created, this.#zone)),
      status,
      button("method", log.method),
      button("ip", log.ip),
      element("bdi", { title: shortUri(log.uri) }, shortUri(log.uri)),
    );
  }
}

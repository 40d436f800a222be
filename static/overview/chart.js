// The chart: records per minute in stacked bars by class of status, drawn by uPlot (../uplot; MIT licence).
//
// A canvas says nothing to a screen reader: its label sums it up, and the same numbers stand in a table below it.
// Dragging over it chooses a window; a pointer over a bar shows its numbers.

import { element } from "./dom.js";
import { CLASSES, formatCount, formatMoment, formatShort, formatTick } from "./format.js";

const { uPlot } = globalThis; // a classic script, deferred as this module is, and before it
const HEIGHT = 180; // px
const SHORTEST_DRAG = 8; // px; less is a click
const MINUTE = 60_000;

/** The API's buckets as uPlot's data: the middle of each bar (s), and how high it is up to 5xx, up to 4xx and so on. */
export function stack(buckets) {
  const edges = buckets.map((bucket) => [bucket.date_from, bucket.date_to].map((date) => Date.parse(date)));
  const heights = CLASSES.map((_, top) =>
    buckets.map((bucket, index) => {
      const count = CLASSES.slice(0, top + 1).reduce((sum, name) => sum + bucket[name], 0);
      return (count * MINUTE) / (edges[index][1] - edges[index][0]);
    }),
  );
  return [edges.map(([from, to]) => (from + to) / 2000), ...heights.reverse()]; // each covers what was drawn before it
}

/** The end of the upper axis; a few whole numbers while little is going on. */
export function roundUp(highest) {
  if (highest <= 4) return 4;
  const power = 10 ** Math.floor(Math.log10(highest));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((factor) => factor * power >= highest);
}

export class Chart {
  #host;
  #tip;
  #onChoose;
  #plot = null;
  #buckets = [];
  #zone = "utc";

  /** `onChoose(from, to)` gets the window that was dragged over. */
  constructor(host, tip, onChoose) {
    this.#host = host;
    this.#tip = tip;
    this.#onChoose = onChoose;
    new ResizeObserver(() => this.#plot?.setSize({ width: host.clientWidth, height: HEIGHT })).observe(host);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#plot?.redraw());
  }

  show(buckets, zone) {
    this.#buckets = buckets;
    this.#zone = zone;
    if (this.#plot) this.#plot.setData(stack(buckets));
    else this.#plot = new uPlot(this.#options(), stack(buckets), this.#host);
  }

  #options() {
    const style = getComputedStyle(document.documentElement); // live, and asked at each drawing: light and dark
    const color = (name) => () => style.getPropertyValue(`--${name}`);
    const axis = { stroke: color("quiet"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false } };
    const bars = { width: 0, points: { show: false }, paths: uPlot.paths.bars({ size: [0.85, 60] }) };
    return {
      width: this.#host.clientWidth,
      height: HEIGHT,
      padding: [8, 16, 0, 0],
      legend: { show: false },
      tzDate: (seconds) => this.#dateOf(seconds),
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: false } },
      scales: { x: { range: () => this.#edges() }, y: { range: (_, __, highest) => [0, roundUp(highest)] } },
      axes: [
        { ...axis, size: 28, space: 60, values: (_, ticks, __, ___, step) => this.#nameTicks(ticks, step) },
        { ...axis, size: 48, values: (_, ticks) => ticks.map((tick) => (tick % 1 ? "" : formatShort(tick))) },
      ],
      series: [{}, ...CLASSES.map((name) => ({ ...bars, label: name, fill: color(`class-${name}`) })).reverse()],
      hooks: { setCursor: [(plot) => this.#point(plot)], setSelect: [(plot) => this.#choose(plot)] },
    };
  }

  /** Ticks stand at whole hours and days of the zone. */
  #dateOf(seconds) {
    const date = new Date(seconds * 1000);
    return this.#zone === "utc" ? uPlot.tzDate(date, "Etc/UTC") : date;
  }

  #nameTicks(ticks, step) {
    return ticks.map((seconds) => formatTick(seconds * 1000, this.#zone, step * 1000));
  }

  #edges() {
    return [this.#buckets[0].date_from, this.#buckets.at(-1).date_to].map((date) => Date.parse(date) / 1000);
  }

  #point(plot) {
    const bucket = plot.cursor.left < 0 ? undefined : this.#buckets[plot.cursor.idx];
    this.#tip.hidden = !bucket;
    if (!bucket) return;
    const lines = CLASSES.filter((name) => bucket[name]).map((name) =>
      element("li", { className: `class-${name}` }, `${name} ${formatCount(bucket[name])}`),
    );
    const [from, to] = [bucket.date_from, bucket.date_to].map((date) => formatMoment(Date.parse(date), this.#zone));
    this.#tip.replaceChildren(`${from} to ${to.slice(11)}`, element("ul", {}, ...lines));
    const box = plot.over.getBoundingClientRect();
    const right = box.left + plot.cursor.left + 12; // of the pointer, unless it would stand over the edge
    const { offsetWidth } = this.#tip;
    this.#tip.style.left = `${Math.max(4, Math.min(right, innerWidth - offsetWidth - 8))}px`;
    this.#tip.style.top = `${box.top - this.#tip.offsetHeight - 4}px`;
  }

  #choose(plot) {
    const { left, width } = plot.select;
    if (width < SHORTEST_DRAG) return;
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    const [first, last] = [left, left + width].map((px) => this.#buckets[plot.posToIdx(px)]);
    this.#onChoose(Date.parse(first.date_from), Date.parse(last.date_to));
  }
}

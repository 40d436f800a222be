// The newest lines: where to begin, and then `next` for ever.
//
// A window that the API closed with its `next` link never changes, and what follows starts where it ended. So each
// record is shown once, however often requests fail, as long as `next` is only taken from a reply that came whole.
// When more comes in than anyone could read, the feed leaves records out, says so, and goes on at the newest ones.

import { queryOf } from "./view.js";

const FIRST_LINES = 50; // when a view opens
const PART_RECORDS = 1000; // one request's
const MOST_PARTS = 5; // one after the other; who is further behind leaves records out
const POLL_SECONDS = 2;
const BUCKETS = 60;

const totalOf = (bucket) => bucket["1xx"] + bucket["2xx"] + bucket["3xx"] + bucket["4xx"] + bucket["5xx"];

/** The newest bucket from whose start on there are `wanted` records, and how many there are; else the first one. */
export function bucketBefore(buckets, wanted) {
  let count = 0;
  let index = buckets.length;
  while (count < wanted && index > 0) count += totalOf(buckets[--index]);
  return { bucket: buckets[index], count };
}

export class Feed {
  #api;
  #show;
  #begun = null; // { frame, filters, buckets }
  #next = null; // the query that goes on
  #fullParts = 0; // one after the other

  /** `show(records, skipped)` gets them in their order; `skipped`: they do not follow those shown before. */
  constructor(api, show) {
    this.#api = api;
    this.#show = show;
  }

  /** From now on another window, with its counts. */
  begin(frame, filters, buckets) {
    this.#begun = { frame, filters, buckets };
    this.#next = null;
    this.#fullParts = 0;
  }

  /** One request's worth. The seconds until there may be more, or null for never. */
  async step(signal) {
    this.#next ??= this.#queryFrom(await this.#findStart(this.#begun.buckets, signal));
    const skipped = this.#fullParts >= MOST_PARTS && (await this.#skip(signal));
    const { records, next } = await this.#api.records(this.#next, signal);
    this.#next = next;
    this.#fullParts = records.length < PART_RECORDS ? 0 : skipped ? 1 : this.#fullParts + 1;
    this.#show(records, skipped);
    if (this.#fullParts) return 0;
    const { frame } = this.#begun;
    return frame.moves || (next.has("date_to") && frame.to > this.#api.now()) ? POLL_SECONDS : null;
  }

  /** Goes on at the newest records; false if that would be no way forward. */
  async #skip(signal) {
    const from = Date.parse(this.#next.get("date_from"));
    const { buckets } = await this.#count(from, this.#api.now() + 1000, signal);
    const start = await this.#findStart(buckets, signal);
    if (start <= this.#next.get("date_from")) return false; // both have all decimals and a Z
    this.#next = this.#queryFrom(start);
    return true;
  }

  /** Where the newest lines begin. Records are only read upwards, so counts tell: each look at one divides by sixty. */
  async #findStart(buckets, signal) {
    let { bucket, count } = bucketBefore(buckets, FIRST_LINES);
    while (count > PART_RECORDS) {
      const [from, to] = [bucket.date_from, bucket.date_to].map((date) => Date.parse(date));
      if (to - from < 2) break; // ms: so many at once are no matter of finding
      const newer = count - totalOf(bucket);
      const closer = bucketBefore((await this.#count(from, to, signal)).buckets, FIRST_LINES - newer);
      bucket = closer.bucket;
      count = closer.count + newer;
    }
    return bucket.date_from;
  }

  #count(from, to, signal) {
    return this.#api.stats(queryOf({ from, to }, this.#begun.filters, { buckets: BUCKETS, top: 0 }), signal);
  }

  #queryFrom(start) {
    const { frame, filters } = this.#begun;
    const query = queryOf(frame, filters, { date_from: start, limit: PART_RECORDS });
    if (frame.moves) query.delete("date_to");
    return query;
  }
}

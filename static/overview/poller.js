// Asks again and again, gently: one request in flight, none while the tab is hidden, and pauses that grow while the
// backend is away.

const FIRST_RETRY_SECONDS = 1;
const LONGEST_RETRY_SECONDS = 15;

/** The pause before the n-th retry, spread so that many pages do not come back all at once. */
export function retrySeconds(failures, retryAfter, random) {
  const pause = Math.min(FIRST_RETRY_SECONDS * 2 ** (failures - 1), LONGEST_RETRY_SECONDS);
  return Math.max(pause * (0.75 + random / 2), retryAfter);
}

export class Poller {
  #step;
  #abort = null; // of the step that is under way
  #timer = null;
  #isDue = false; // came due while the tab was hidden

  /** `step(signal)` gives the seconds until the next one, or null when there is nothing to come. */
  constructor(step) {
    this.#step = step;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.#isDue) this.restart();
    });
  }

  restart() {
    this.stop();
    this.#run();
  }

  /** What is in flight is dropped; nothing of it is shown. */
  stop() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = null;
    this.#isDue = false;
  }

  async #run() {
    if (document.hidden) {
      this.#isDue = true;
      return;
    }
    const abort = (this.#abort = new AbortController());
    let seconds;
    try {
      seconds = await this.#step(abort.signal);
    } catch (error) {
      if (abort.signal.aborted) return;
      throw error;
    }
    if (abort.signal.aborted || seconds === null) return;
    this.#timer = setTimeout(() => this.#run(), seconds * 1000);
  }
}

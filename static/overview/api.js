// The backend's public API, and what can go wrong with it. All addresses are relative to the page's own.

const TOKEN_KEY = `log-pipeline token of ${location.pathname}`;
const TOKEN = /^[A-Za-z0-9._~+/=-]+$/;
const SKEW_MS = 5_000; // a Date header has whole seconds, and is some ms old

/** kind: "away" (ask again), "token" (401), "gone" (410: has `keptFrom`), "refused" (asking again is no use). */
export class ApiError extends Error {
  constructor(kind, detail, more = {}) {
    super(detail);
    Object.assign(this, { kind, retryAfter: 0 }, more);
  }
}

export class Api {
  #token = "";
  #skew = 0; // the server's clock less ours, if it is worth speaking of

  constructor() {
    try {
      this.#token = sessionStorage.getItem(TOKEN_KEY) ?? "";
    } catch (error) {
      if (error.name !== "SecurityError") throw error; // storage is blocked: the token lasts as long as the page
    }
  }

  get hasToken() {
    return this.#token !== "";
  }

  /** What is wrong with the form of a token; "" for nothing, and then it is taken. */
  setToken(text) {
    if (!TOKEN.test(text)) return "A token has letters, digits and ._~+/=- only.";
    this.#token = text;
    try {
      sessionStorage.setItem(TOKEN_KEY, text);
    } catch (error) {
      if (error.name !== "SecurityError") throw error;
    }
    return "";
  }

  /** The server's time: a laptop's clock may be minutes off, and then "the last hour" would be another one. */
  now() {
    return Date.now() + this.#skew;
  }

  async stats(query, signal) {
    return (await this.#ask(`api/stats?${query}`, "json", signal)).body;
  }

  /** A window of records, and the query of the one that follows (RFC 8288). */
  async records(query, signal) {
    const { body, headers } = await this.#ask(`api/data?${query}`, "json", signal);
    return { records: body, next: nextQuery(headers.get("Link")) };
  }

  async download(address) {
    return (await this.#ask(address, "blob")).body;
  }

  async #ask(address, form, signal) {
    const headers = this.#token ? { Authorization: `Bearer ${this.#token}` } : {};
    const response = await answered(fetch(address, { headers, signal, cache: "no-store" }), "unreachable", signal);
    this.#noteClock(response.headers.get("Date"));
    if (!response.ok) throw await errorOf(response, signal);
    const body = await answered(response[form](), "its reply broke off", signal);
    return { body, headers: response.headers };
  }

  #noteClock(date) {
    const skew = Date.parse(date) - Date.now();
    this.#skew = Math.abs(skew) > SKEW_MS ? skew : 0; // no Date, no skew: the comparison with NaN is false
  }
}

/** What the network promises. A reply may break off at any byte, and then nothing of it counts. */
async function answered(promise, otherwise, signal) {
  try {
    return await promise;
  } catch (error) {
    signal?.throwIfAborted();
    throw new ApiError("away", otherwise, { cause: error });
  }
}

async function errorOf(response, signal) {
  const isProblem = response.headers.get("Content-Type")?.startsWith("application/problem+json");
  const problem = isProblem ? await answered(response.json(), "its reply broke off", signal) : {};
  // An answer without one is a proxy's: it may well be another one in a moment
  const detail = problem.detail ?? `it answered ${response.status} ${response.statusText}`.trim();
  if (response.status === 401) return new ApiError("token", detail);
  if (isProblem && response.status === 410) return new ApiError("gone", detail, { keptFrom: problem.kept_from });
  const isFinal = isProblem && response.status < 500 && ![408, 425, 429].includes(response.status);
  if (isFinal) return new ApiError("refused", detail);
  return new ApiError("away", detail, { retryAfter: Number(response.headers.get("Retry-After")) || 0 });
}

/** Only its query: behind a proxy's prefix the path in it is not ours. */
function nextQuery(link) {
  const found = /<[^>?]*\?([^>]*)>\s*;\s*rel="?next"?/.exec(link ?? "");
  if (!found) throw new ApiError("away", "its reply has no Link header");
  return new URLSearchParams(found[1]);
}

-- wrk: one line per POST
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"log": "203.0.113.77 GET https://domain.com/example/5f3a/91bc 200\\n"}'
function done(summary, latency)
  local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format("RESULT %d %d %d\n", summary.requests, summary.duration, bad + summary.errors.status))
end

"""The long fault test: the whole pipeline under load while a seeded schedule of faults strikes; then the oracle.

    python tests/chaos.py --minutes 10 --seed 1 [--sabotage NAME]

2 generating clients with 8 threads each, a client that follows a file which is rotated, 2 backends (one has 2 workers)
behind proxies that do what a bad network does, 4 background instances, and a PostgreSQL of its own. The same seed gives
the same schedule of the faults in chaos_faults.py. After the last strike all is healed, the journals are drained, and
the multisets of lines in journals, database and shared file are compared by id and content (arena.py). Exit 0 if they
are equal, all came to rest in time, and every kind of fault did strike.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from arena import Arena, enter_own_mounts, failures_at_rest
from chaos_faults import DISK_KINDS, KINDS, Strike
from sabotage import sabotaged

SECONDS_BETWEEN = 2.0  # strikes: 30 a minute
FAULT_SECONDS = 300.0  # until the last fault must have ended: one may have to wait for others
LEAST_SHARE = 0.9  # of the planned strikes; the others found nothing to strike


def schedule(seed: int, seconds: float, kinds: Sequence[str]) -> list[Strike]:
    """The strikes of a run. Every kind comes up before one comes up again."""
    dice = random.Random(seed)
    deck: list[str] = []
    strikes = []
    at = 1.0
    while at < seconds:
        if not deck:
            deck = list(kinds)
            dice.shuffle(deck)
        strikes.append(Strike(round(at, 2), deck.pop(), dice.randrange(24), round(dice.uniform(0.3, 3.0), 2)))
        at += dice.uniform(0.5, 1.5) * SECONDS_BETWEEN
    return strikes


class Run:
    """Strikes an arena by a schedule: how often each kind truly struck, and what went wrong."""

    def __init__(self, arena: Arena, strikes: Sequence[Strike]) -> None:
        self.struck: Counter[str] = Counter()
        self.failures: list[str] = []
        self.lines, self.equal = 0, False
        self._arena = arena
        self._strikes = strikes
        self._begin = time.monotonic()

    def strike_all(self) -> None:
        """Each when it is due, several at a time if need be."""
        self._arena.source.writer.start()
        threads = []
        for strike in self._strikes:
            threading.Event().wait(max(0.0, strike.at - self._seconds()))
            threads.append(threading.Thread(target=self._carry_out, args=(strike,), daemon=True))
            threads[-1].start()
        deadline = self._seconds() + FAULT_SECONDS
        for strike, thread in zip(self._strikes, threads, strict=True):
            thread.join(max(0.0, deadline - self._seconds()))
            if thread.is_alive():
                self.failures.append(f"{strike} has not ended")

    def _seconds(self) -> float:
        return time.monotonic() - self._begin

    def _carry_out(self, strike: Strike) -> None:
        try:
            proof = (KINDS | DISK_KINDS)[strike.kind](self._arena, strike)
        except Exception as error:
            self.failures.append(f"{strike}: {type(error).__name__}: {error}")
            proof = f"FAILED: {error}"
        else:
            self.struck[strike.kind] += bool(proof)
        took = f"{strike.at:6.1f} to {self._seconds():6.1f} s"
        print(f"{took}  {strike.kind:38} {proof or 'NOTHING TO STRIKE'}", flush=True)

    def rest(self) -> None:
        """All comes to rest, and is compared."""
        self.failures += failures_at_rest(self._arena.drain, self._compare)

    def _compare(self) -> None:
        self.lines = self._arena.compare()
        self.equal = True

    def judge(self) -> list[str]:
        """What speaks against a good verdict."""
        planned = Counter(strike.kind for strike in self._strikes)
        never = sorted(kind for kind in planned if not self.struck[kind])
        missing = [f"never struck: {', '.join(never)}"] if never else []
        if self.struck.total() < LEAST_SHARE * planned.total():
            missing.append(f"only {self.struck.total()} of {planned.total()} strikes struck")
        return self.failures + missing

    def print_table(self) -> None:
        print(f"\n{'fault':38} planned struck")
        for kind, planned in sorted(Counter(strike.kind for strike in self._strikes).items()):
            print(f"{kind:38} {planned:7d} {self.struck[kind]:6d}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sabotage", default="", help="break one invariant on purpose: see tests/sabotage.py")
    options = parser.parse_args(arguments)
    kinds, left_out = list(KINDS | DISK_KINDS), ""
    try:
        enter_own_mounts()
    except OSError as error:
        kinds, left_out = list(KINDS), f"{len(DISK_KINDS)} kinds left out, as no disk can be mounted here ({error})"
    strikes = schedule(options.seed, options.minutes * 60, kinds)
    print(f"seed {options.seed}, {len(strikes)} strikes in {options.minutes:g} minutes, {len(kinds)} kinds", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        if options.sabotage:
            stack.enter_context(sabotaged(folder, options.sabotage))
        arena = Arena(folder, options.seed, with_disks=not left_out)
        stack.callback(arena.destroy)
        run = Run(arena, strikes)
        run.strike_all()
        run.rest()
        against = run.judge()
        stack.pop_all().close()  # all parts have ended
        (arena.keep if against else arena.remove)()
    run.print_table()
    if left_out:
        print(f"\n{left_out}")
    verdict = "equal" if not against else "FAILED" if run.equal else "NOT EQUAL"
    print(f"\nseed {options.seed}: {run.struck.total()} strikes, {run.lines} lines, verdict: {verdict}")
    print(*against, sep="\n", end="\n" if against else "")
    if against:
        print(f"files and outputs are kept in {folder}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

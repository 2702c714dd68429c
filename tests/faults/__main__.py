"""Run campaigns of seeded faults: `python -m tests.faults [campaign ...]`."""

from __future__ import annotations

import argparse
import os
import sys
import time


os.environ.setdefault("OMP_NUM_THREADS", "1")  # trials are forked, which threads would not survive
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.faults.campaigns import campaigns, run


def main() -> int:
    known = campaigns()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="campaign", help=f"Some of {', '.join(known)}; default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--few", action="store_true", help="Only as many trials as the test suite runs.")
    parser.add_argument("--count", type=int, help="How many trials of each campaign, from the first.")
    parser.add_argument("--trials", type=int, nargs="+", help="Only the trials with these numbers.")
    options = parser.parse_args()
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} is no campaign; write some of {', '.join(known)}.")
    torch.set_num_threads(1)
    table, failures = [], 0
    for name in options.names or known:
        campaign = known[name]
        if campaign.prepare:
            campaign.prepare()
        for seed in options.seeds:
            count = options.count or (campaign.few if options.few else campaign.trials)
            start, numbers, failed = time.perf_counter(), options.trials or range(count), 0
            for number in numbers:
                reason = run(name, campaign, seed, number)
                if reason:
                    failed += 1
                    print(f"FAILED {name} --seeds {seed} --trials {number}\n{reason}", flush=True)
                if sys.stderr.isatty():
                    print(f"\r{name}, seed {seed}: {number + 1}/{count}, {failed} failed", end="", file=sys.stderr)
            failures += failed
            table.append((name, seed, len(numbers), len(numbers) - failed, failed, time.perf_counter() - start))
            print("{}, seed {}: {} tried, {} passed, {} failed, {:.0f} s".format(*table[-1]), flush=True)
    print(f"\n{'campaign':<20}{'seed':>6}{'tried':>8}{'passed':>8}{'failed':>8}{'s':>8}")
    for name, seed, *numbers in table:
        print(f"{name:<20}{seed:>6}" + "".join(f"{number:>8.0f}" for number in numbers))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Play one schedule of the laboratory again and print its story: `python -m tests.faults.replay SEED`."""

from __future__ import annotations

import argparse

from tests.faults.verdict import Bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument(
        "--without", type=int, nargs="*", default=[], help="faults to leave out, by their number"
    )
    chosen = parser.parse_args()
    bench = Bench()
    try:
        setting, faults = bench.schedule(chosen.seed)
        print(f"setting {setting.name}: {dict(setting.job)} {dict(setting.peer)}")
        for number, fault in enumerate(faults):
            print(f"  {number}: {'(left out) ' if number in chosen.without else ''}{fault}")
        kept = [fault for number, fault in enumerate(faults) if number not in chosen.without]
        outcome = bench.play(chosen.seed, setting, kept)
        print(outcome.story)
        print(outcome.headline)
        return int(bool(outcome.problem))
    finally:
        bench.close()


if __name__ == "__main__":
    raise SystemExit(main())

"""Random problems against the oracle for as long as you like.

    VICUS_BRIDGE=build/tests/bridge/libvicus_bridge.so python tests/python/stress.py --cases 20000 --seed 7

Every case prints how to run it alone when it fails; the run goes on, and its exit status says whether any did.
"""

import argparse
import sys
import time
import traceback

import bridge
import cases
import compare
import memory
import numpy as np


def one(seed, engine, target):
    choose = cases.RandomChooser(seed)
    kind, dtype = choose.pick(cases.KINDS), choose.pick(list(memory.DTYPES))
    drawn = choose.pick(bridge.info()["targets"])  # also when it is not used: the case stays the same
    target = target or drawn
    bridge.limit_cpu_target(target)
    return cases.case(choose, kind, dtype, engine), target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many problems (default 1000)")
    parser.add_argument("--seed", type=int, default=None, help="first seed; case i uses seed + i (default: the clock)")
    parser.add_argument("--engine", default="cpu", choices=["cpu", "reference", "auto"])
    parser.add_argument("--target", default="", help="CPU target; default: any that this machine runs")
    args = parser.parse_args()
    first = int(time.time()) % 10**9 if args.seed is None else args.seed
    failures, worst, began = 0, 0.0, time.monotonic()
    for i in range(args.cases):
        seed = first + i
        case, target = one(seed, args.engine, args.target)
        try:
            worst = max(worst, compare.check_case(case))
        except (AssertionError, bridge.VicusError) as error:
            failures += 1
            print(
                f"\nFAILED --cases 1 --seed {seed} --engine {args.engine} --target {target}: {error}\n  {case}",
                flush=True,
            )
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        if sys.stderr.isatty() and i % 20 == 0:
            print(f"\r{i + 1}/{args.cases}, {failures} failed, worst {worst:.2f} of allowed", end="", file=sys.stderr)
    took = time.monotonic() - began
    print(
        f"{args.cases} cases from seed {first} in {took:.0f} s: {failures} failed; "
        f"largest error {worst:.2f} of what is allowed (numpy {np.__version__})"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

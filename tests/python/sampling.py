"""Runs a check on many random cases, repeatably."""

import os
import zlib

import bridge
import hypothesis

# A sanitizer build is many times slower and looks for other things than rounding.
SLOWER = {"": 1.0, "address": 0.05, "thread": 0.03}


def scaled(count):
    factor = float(os.environ.get("VICUS_EXAMPLES", "1")) * SLOWER[bridge.info()["sanitizer"]]
    return max(3, round(count * factor))


def for_cases(label, strategy, count, check):
    """Checks `count` cases. Each label draws its own; the fixed profile draws the same ones in every run.

    In every run of the same tests: hypothesis also draws numbers that stand in the modules that are loaded.
    """

    @hypothesis.settings(max_examples=scaled(count))
    @hypothesis.given(case=strategy)
    def body(case):
        check(case)

    if hypothesis.settings.default.derandomize:
        seed = zlib.crc32(label.encode())
        print(f"{label}: hypothesis seed {seed}")
        body = hypothesis.seed(seed)(body)
    body()

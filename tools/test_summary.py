#!/usr/bin/env python3
"""Adds up the cases of every JUnit file under the given paths; the last line printed is 'N passed, N failed'.

Exits 1 if anything failed, if nothing ran, or if a runner ended badly (--status) without a case to show for it.
"""

import argparse
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path


def outcome(case: ET.Element) -> str:
    tags = {child.tag for child in case}
    # CTest marks tests that it could not start with status "notrun" and a <skipped> element: that is a failure, unless
    # the test itself is disabled or asked to be skipped.
    if tags & {"failure", "error"} or case.get("status") == "fail":
        return "failed"
    if "skipped" in tags or case.get("status") in ("notrun", "disabled"):
        message = " ".join(child.get("message", "") for child in case)
        return "failed" if "Unable to find" in message or "NOT_BUILT" in case.get("name", "") else "skipped"
    return "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="JUnit files, or folders to search for *.xml")
    parser.add_argument("--status", type=int, default=0, help="exit status of the runners that wrote them")
    args = parser.parse_args()

    total: Counter[str] = Counter()
    broken = []
    for path in args.paths:
        for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
            try:
                cases = list(ET.parse(file).iter("testcase"))
            except (OSError, ET.ParseError) as error:
                broken.append(f"{file}: {error}")
                continue
            counts = Counter(outcome(case) for case in cases)
            total += counts
            print(f"{file}: " + ", ".join(f"{counts[k]} {k}" for k in ("passed", "failed", "skipped") if counts[k]))
            for case in cases:
                if outcome(case) == "failed":
                    print(f"  FAILED {case.get('classname', '')} {case.get('name', '')}".rstrip())
    for line in broken:
        print(f"  UNREADABLE {line}")
    failed = total["failed"] + len(broken)
    if args.status and not failed:
        print(f"  a test runner ended with status {args.status} and reported no failure")
        failed = 1
    print(
        f"{total['passed']} passed, {failed} failed" + (f", {total['skipped']} skipped" if total["skipped"] else ""),
        flush=True,
    )
    return 1 if failed or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())

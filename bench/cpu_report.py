"""What a run of cpu.py means: the table, and which of the targets in the problem file the measurement meets."""

from __future__ import annotations

import statistics
from typing import Any

MIB = 2**20
MOST_SCRATCH = 4 * MIB  # per thread
LEAST_SCALING = 1.9  # one thread to two
LEAST_CPU_SHARE = 0.9  # of the processor time that the threads could have had

Row = dict[str, Any]


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def disturbed(row: Row) -> bool:
    """Others had the cores while this was measured. A tiny problem may keep one thread busy, which shows nothing."""
    return row["seconds"]["median"] > 1e-3 and row["cpu_share"] < LEAST_CPU_SHARE


def judge(problems: list[dict[str, Any]], rows: list[Row], threads: int) -> list[Row]:
    """One entry per target: what, measured, wanted, met.

    `met` is None where there was nothing to compare with, and where the machine was shared: on such a machine a peak, a
    peer and a kernel suffer differently, and a target could be met or missed by accident.
    """
    found = {(row["problem"], row["pass"], row["threads"]): row for row in rows}
    targets: list[Row] = []

    def add(row: Row, what: str, measured: float | None, wanted: float, at_least: bool, others: tuple = ()) -> None:
        met = None if measured is None else (measured >= wanted if at_least else measured <= wanted)
        shared = "MiB" not in what and any(disturbed(r) for r in (row, *others))
        name = {"problem": row["problem"], "pass": row["pass"], "threads": row["threads"], "what": what}
        limit = {"at_least" if at_least else "at_most": wanted}
        targets.append({**name, "measured": measured, **limit, "met": None if shared else met, "disturbed": shared})

    for problem in problems:
        for direction in ("forward", "backward"):
            row = found[problem["name"], direction, threads]
            wanted = problem.get("targets", {}).get(direction, {})
            if "peak_share" in wanted:
                add(row, "share of peak", row["peak_share"], wanted["peak_share"], True)
            if "peer_ratio" in wanted:
                add(row, "times the best peer", row.get("peer_ratio"), wanted["peer_ratio"], True)
            if "slowdown" in wanted:
                same = found.get((problem["same_as"], direction, threads))
                slowdown = row["seconds"]["median"] / same["seconds"]["median"] if same else None
                add(row, f"time of {problem['same_as']}", slowdown, wanted["slowdown"], False, (same,) if same else ())
            if problem.get("scaling") and threads == 2:
                alone = found[problem["name"], direction, 1]
                scaling = alone["seconds"]["median"] / row["seconds"]["median"]
                add(row, "times one thread", scaling, LEAST_SCALING, True, (alone,))
    for row in rows:
        if row.get("scratch_bytes_per_thread") is not None:
            planned = row["scratch_bytes_per_thread"] / MIB
            add(row, "MiB of scratch per thread, planned", planned, MOST_SCRATCH / MIB, False)
        if row.get("resident_growth_bytes_per_thread") is not None:
            growth = row["resident_growth_bytes_per_thread"] / MIB
            add(row, "MiB of growth per thread, measured", growth, MOST_SCRATCH / MIB, False)
    return targets


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4f}" if seconds < 1e-3 else f"{seconds * 1e3:.2f}"


def print_table(header: list[str], lines: list[list[str]], left: int) -> None:
    """The first `left` columns are words, the others numbers."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        padded = zip(line, widths, strict=True)
        cells = [text.ljust(width) if i < left else text.rjust(width) for i, (text, width) in enumerate(padded)]
        print("  ".join(cells).rstrip())


def row_line(row: Row) -> list[str]:
    peer = row.get("best_peer")
    peer_seconds = milliseconds(row["peers"][peer]["seconds"]["median"]) if peer else "-"
    ratio = f"{row['peer_ratio']:.2f}" if peer else "-"
    work = f"{row['work_ratio']:.2f}" if "work_ratio" in row else "-"
    spread = f"{milliseconds(row['seconds']['min'])} .. {milliseconds(row['seconds']['max'])}"
    speed = [f"{row['gflops']:.1f}", f"{100 * row['peak_share']:.1f}"]
    measured = [milliseconds(row["seconds"]["median"]), spread, *speed]
    name = [row["problem"], row["pass"], peer or "-"]
    return [*name, str(row["threads"]), *measured, work, peer_seconds, ratio]


def target_line(target: Row) -> list[str]:
    limit = f"<= {target['at_most']:.2f}" if "at_most" in target else f">= {target['at_least']:.2f}"
    measured = "-" if target["measured"] is None else f"{target['measured']:.2f}"
    mark = {True: "pass", False: "SHORT", None: "disturbed" if target["disturbed"] else "not measured"}[target["met"]]
    return [target["problem"], target["pass"], target["what"], mark, str(target["threads"]), measured, limit]


def print_report(report: Row) -> None:
    cpu = report["cpu"]
    name = f"{cpu['name']} (family {cpu['family']} model {cpu['model']})"
    print(f"\n{name}, {cpu['cores']} cores, commit {report['commit']}")
    for peak in report["peak"]:
        print(f"FMA peak at the start, {peak['threads']} threads, {peak['type']}: {peak['gflops']:.1f} GFLOP/s")
    reasons = {
        (peer, known["unsupported"])
        for row in report["rows"]
        for peer, known in row["peers"].items()
        if "unsupported" in known and "see sdpa" not in known["unsupported"]
    }
    for peer, reason in sorted(reasons):
        print(f"{peer} unsupported somewhere: {reason}")
    busy = {row["problem"] for row in report["rows"] if disturbed(row)}
    if busy:
        print(f"the cores were shared with others while these ran, their times are too long: {', '.join(sorted(busy))}")
    print("\nTargets")
    scratch = [t for t in report["targets"] if "MiB" in t["what"]]
    shown = [t for t in report["targets"] if "MiB" not in t["what"]]
    for what in sorted({t["what"] for t in scratch}):  # one line for the largest of all rows
        shown.append(max((t for t in scratch if t["what"] == what), key=lambda t: t["measured"]))
    header = ["problem", "pass", "target", "mark", "threads", "measured", "wanted"]
    print_table(header, [target_line(t) for t in shown], 4)
    print()
    header = ["problem", "pass", "best peer", "threads", "vicus ms", "min .. max"]
    header += ["GFLOP/s", "% peak", "work", "peer ms", "ratio"]
    print_table(header, [row_line(row) for row in report["rows"]], 3)

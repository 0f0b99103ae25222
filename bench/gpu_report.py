"""What a run of gpu.py means: floors and shares of each row, the targets, and the tables."""

from __future__ import annotations

from typing import Any

from cpu_report import print_table

Row = dict[str, Any]

# Of the issue of engine sm80: seconds.
MOST_COMPILED, MOST_FROM_DISK, MOST_HOST_RATIO = 1.0, 0.020, 2.0


def seconds_of(row: Row) -> float | None:
    return row["seconds"]["median"] if "seconds" in row else None


def finish_row(row: Row, ceilings: dict[str, float]) -> None:
    """Adds speed, floors and ratios. A floor is the least time that operations, or bytes, can take here."""
    seconds = seconds_of(row)
    if seconds is None:
        return
    rate = ceilings[f"{row['dtype']}_flops"]
    row["milliseconds"] = seconds * 1e3
    row["tflops"] = row["flops"] / seconds * 1e-12
    if "work_ratio" in row:
        row["executed_tflops"] = row["tflops"] * row["work_ratio"]
    row["share_of_matmul"] = row["flops"] / seconds / rate
    row["floors"] = {"flops": row["flops"] / rate, "bytes": row["bytes"] / ceilings["copy_bytes"]}
    row["times_floor"] = seconds / max(row["floors"].values())
    row["times_memory_floor"] = seconds / row["floors"]["bytes"]
    now = {name: known for name, known in row.get("peers", {}).items() if "seconds" in known and "of" not in known}
    peers = {name: seconds_of(known) for name, known in now.items()}
    if peers:
        row["best_peer"] = min(peers, key=peers.get)
        row["peer_ratio"] = peers[row["best_peer"]] / seconds


def judge(problems: list[Row], rows: list[Row], report: Row) -> list[Row]:
    """One entry per target; `met` is None where nothing was measured."""
    found = {(row["problem"], row["pass"]): row for row in rows}
    targets: list[Row] = []

    def add(problem: str, way: str, what: str, value: float | None, wanted: float, at_least: bool) -> None:
        met = None if value is None else (value >= wanted if at_least else value <= wanted)
        limit = {"at_least" if at_least else "at_most": wanted}
        targets.append({"problem": problem, "pass": way, "what": what, "measured": value, **limit, "met": met})

    known = {
        "milliseconds": ("milliseconds", "milliseconds", False),
        "tflops": ("TFLOP/s", "tflops", True),
        "memory_floor": ("times memory floor", "times_memory_floor", False),
        "floor": ("times floor", "times_floor", False),
        "peer_ratio": ("times the best peer", "peer_ratio", True),
        "slowdown": ("time of {same_as} per work", "slowdown", False),
    }
    for problem in problems:
        for way, wanted in problem.get("targets", {}).items():
            if way not in problem.get("passes", [way]):
                continue
            row = found.get((problem["name"], way), {})
            for name, limit in wanted.items():
                what, key, at_least = known[name]
                add(problem["name"], way, what.format(**problem), row.get(key), limit, at_least)
    first = report.get("first_calls", {})
    for state, most, what in (
        ("compiled", MOST_COMPILED, "seconds, first call"),
        ("from_disk", MOST_FROM_DISK, "seconds, first call from disk"),
    ):
        for name, times in first.get(state, {}).items():
            if name != "process":
                add(name, "forward", what, times["forward"], most, False)
    host = report.get("host_seconds")
    if host:
        for name in ("na2d", "attention"):
            add(name, "forward", "times SDPA's host time", host[name] / host["sdpa"], MOST_HOST_RATIO, False)
    for row in rows:
        local = max((k["local_bytes"] for k in row.get("kernels", [])), default=0)
        if local:
            add(row["problem"], row["pass"], "bytes of stack and spills", local, 0, False)
    return targets


def finish(report: Row, problems: list[Row]) -> None:
    rows = report["rows"]
    for row in rows:
        finish_row(row, report["ceilings"])
    tflops = {(row["problem"], row["pass"]): row["tflops"] for row in rows if "tflops" in row}
    for problem in problems:
        for row in (row for row in rows if row["problem"] == problem["name"]):
            published = problem.get("published", {}).items()
            row["published"] = {name: times[row["pass"]] for name, times in published if row["pass"] in times}
            same = tflops.get((problem.get("same_as"), row["pass"]))
            if same and "tflops" in row:
                row["slowdown"] = same / row["tflops"]
    report["targets"] = judge(problems, rows, report)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def row_line(row: Row) -> list[str]:
    seconds = seconds_of(row)
    if seconds is None:
        return [row["problem"], row["pass"], row["unsupported"][:60], *[""] * 9]
    peer = row.get("best_peer")
    spread = f"{duration(row['seconds']['min'])} .. {duration(row['seconds']['max'])}"
    work = f"{row['work_ratio']:.2f}" if "work_ratio" in row else "-"
    floors = [duration(row["floors"]["bytes"]), duration(row["floors"]["flops"]), f"{row['times_floor']:.2f}"]
    peers = [duration(seconds_of(row["peers"][peer])), f"{row['peer_ratio']:.2f}"] if peer else ["-", "-"]
    executed = f"{row['executed_tflops']:.0f}" if "executed_tflops" in row else "-"
    speed = [f"{row['tflops']:.0f}", executed, f"{100 * row['share_of_matmul']:.0f}"]
    return [row["problem"], row["pass"], peer or "-", duration(seconds), spread, *speed, work, *floors, *peers]


def kernel_lines(rows: list[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        for k in row.get("kernels", []):
            counts = [k["threads"], k["registers"], k["local_bytes"], k["shared_bytes"], k["blocks_per_multiprocessor"]]
            lines.append([row["problem"], row["pass"], k["name"], *map(str, counts)])
    return lines


def target_line(target: Row) -> list[str]:
    limit = f"<= {target['at_most']:g}" if "at_most" in target else f">= {target['at_least']:g}"
    value = "-" if target["measured"] is None else f"{target['measured']:.3g}"
    mark = {True: "pass", False: "SHORT", None: "not measured"}[target["met"]]
    return [target["problem"], target["pass"], target["what"], mark, value, limit]


def print_report(report: Row) -> None:
    gpu, ceilings = report["gpu"], report["ceilings"]
    print(f"\n{gpu['name']}, driver {gpu['driver']}, torch {report['versions']['torch']}, commit {report['commit']}")
    rates = ", ".join(
        f"{name[:-6]} {ceilings[name] * 1e-12:.0f} TFLOP/s" for name in ceilings if name.endswith("flops")
    )
    print(f"8192^3 matrix product: {rates}; copy {ceilings['copy_bytes'] * 1e-9:.0f} GB/s")
    print("\nTargets")
    print_table(
        ["problem", "pass", "target", "mark", "measured", "wanted"], [target_line(t) for t in report["targets"]], 4
    )
    print()
    header = ["problem", "pass", "best peer", "vicus", "min .. max", "TFLOP/s", "executed", "% matmul", "work"]
    header += ["bytes floor", "flops floor", "x floor", "peer", "ratio"]
    lines = [row_line(row) for row in report["rows"]]
    print_table(header, [line + [""] * (len(header) - len(line)) for line in lines], 3)
    print("\nPeers")
    for row in report["rows"]:
        for name, known in row.get("peers", {}).items():
            when = f" (run of {known['of']['date'][:10]})" if "of" in known else ""
            said = known.get("unsupported") or duration(seconds_of(known))
            print(f"{row['problem']} {row['pass']} {name}: {said}{when}")
    for name, source in report.get("published", {}).items():
        print(f"\nNot measured here: {name}, {source}")
        for row in report["rows"]:
            if name in row.get("published", {}) and "milliseconds" in row:
                time = row["published"][name]
                ratio = time / row["milliseconds"]
                print(f"{row['problem']} {row['pass']} {name}: {duration(time * 1e-3)}, ratio {ratio:.2f}")
    print()
    header = ["problem", "pass", "kernel", "threads", "registers", "local", "shared", "blocks/SM"]
    print_table(header, kernel_lines(report["rows"]), 3)
    if "host_seconds" in report:
        print("\nhost time of a call: " + ", ".join(f"{n} {duration(s)}" for n, s in report["host_seconds"].items()))
    for state, times in report.get("first_calls", {}).items():
        print(f"first calls, {state}: {times}")

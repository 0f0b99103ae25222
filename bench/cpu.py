"""Measures vicus on this machine's CPU next to PyTorch's ways to compute the same, and writes what it found.

Run by `make bench-cpu` (BENCH_ARGS='--quick --only 2d' for less). Peak first; then per problem several rounds, vicus
and peers taking turns, each in its own process with the same number of threads. README.md explains the columns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu_report import judge, median, print_report

HERE = Path(__file__).resolve().parent
PEERS = ("sdpa", "sdpa-mask", "flex")
PASSES = ("forward", "backward")
SLOW_SECONDS = 3.0  # a call this long is not asked for again in later rounds


class Driver:
    """Runs vicus_bench, one process per question."""

    def __init__(self, path: Path, problems: Path) -> None:
        self.path, self.problems = path, problems
        self.about: dict[str, Any] = {}

    def ask(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"bench: {done.stderr.strip() or f'vicus_bench ended with {done.returncode}'}")
        answer = json.loads(done.stdout)
        self.about = {name: answer[name] for name in ("version", "cpu_targets", "peak_target")}
        return answer

    def peak(self, threads: int) -> list[dict[str, Any]]:
        return self.ask("--peak-only", "--threads", str(threads))["peak"]

    def rows(self, name: str, threads: int, timing: dict[str, Any], check: bool) -> list[dict[str, Any]]:
        options = ["--exactly", name, "--threads", str(threads), "--repeats", str(timing["repeats"])]
        options += ["--least-seconds", str(timing["least_seconds"]), "--most-seconds", str(timing["most_seconds"])]
        options += ["--check-samples", "8" if check else "0", "--problems", str(self.problems)]
        return self.ask(*options)["rows"]


class Peers:
    """The worker of torch_peers.py."""

    def __init__(self, timing: dict[str, Any]) -> None:
        self.timing = timing
        self.worker = subprocess.Popen(
            [sys.executable, str(HERE / "torch_peers.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.worker.stdin and self.worker.stdout
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        line = self.worker.stdout.readline()
        if not line:
            raise SystemExit(f"bench: torch_peers.py ended with {self.worker.wait()}")
        return json.loads(line)

    def time(self, problem: dict[str, Any], peer: str, direction: str, threads: int) -> dict[str, Any]:
        asked = {"problem": problem, "peer": peer, "pass": direction, "threads": threads}
        return self.ask({**asked, **self.timing})

    def close(self) -> None:
        assert self.worker.stdin
        self.worker.stdin.close()
        self.worker.wait()


def spread(samples: list[float]) -> dict[str, Any]:
    return {"median": median(samples), "min": min(samples), "max": max(samples), "samples": len(samples)}


def add_round(row: dict[str, Any], samples: list[float]) -> None:
    row.setdefault("all", []).extend(samples)


def measure_vicus(
    driver: Driver, rows: dict[tuple[str, str, int], Any], name: str, threads: int, timing: dict[str, Any], check: bool
) -> None:
    for new in driver.rows(name, threads, timing, check):
        key = (name, new["pass"], threads)
        row = rows.setdefault(key, {**new, "peers": {}})
        add_round(row, new["seconds"]["samples"])
        row["peak_gflops"] = max(row["peak_gflops"], new["peak_gflops"])
        row.setdefault("cpu_rounds", []).append(new["cpu_seconds"])


def measure_peers(peers: Peers, rows: dict[tuple[str, str, int], Any], problem: dict[str, Any], threads: int) -> None:
    for peer in PEERS:
        for direction in PASSES:
            row = rows[problem["name"], direction, threads]
            known = row["peers"].setdefault(peer, {})
            if "unsupported" in known or max(known.get("all", [0.0])) > SLOW_SECONDS:
                continue
            answer = peers.time(problem, peer, direction, threads)
            if "unsupported" in answer:
                known["unsupported"] = answer["unsupported"]
                continue
            if answer["mask_pairs"] not in (None, row["mask_pairs"]):
                raise SystemExit(
                    f"bench: {problem['name']}: {peer} computes {answer['mask_pairs']} pairs, vicus {row['mask_pairs']}"
                )
            add_round(known, answer["seconds"])


def finish(rows: dict[tuple[str, str, int], Any]) -> list[dict[str, Any]]:
    """Medians over all rounds; shares of the best peak seen in the rounds of the problem.

    Not of the whole run: the clock of a rented core drifts by a tenth within minutes, and a peak belongs to its time.
    """
    for row in rows.values():
        samples, row["cpu_seconds"] = row.pop("all"), median(row.pop("cpu_rounds"))
        row["seconds"] = spread(samples)
        row["cpu_share"] = row["cpu_seconds"] / (sum(samples) / len(samples)) / row["threads"]
        row["gflops"] = row["flops"] / row["seconds"]["median"] * 1e-9
        row["peak_share"] = row["gflops"] / row["peak_gflops"]
        row["floor_seconds"] = row["flops"] / row["peak_gflops"] * 1e-9
        measured = {}
        for peer, known in row["peers"].items():
            if "all" in known:
                known["seconds"] = spread(known.pop("all"))
                measured[known["seconds"]["median"]] = peer
        if measured:
            row["best_peer"] = measured[min(measured)]
            row["peer_ratio"] = min(measured) / row["seconds"]["median"]
    return list(rows.values())


def processor() -> dict[str, str]:
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, text = line.partition(":")
        info.setdefault(key.strip(), text.strip())
    return {
        "name": info.get("model name", "unknown"),
        "family": info.get("cpu family", ""),
        "model": info.get("model", ""),
    }


def slug(cpu: dict[str, str]) -> str:
    text = "-".join(part for part in (cpu["name"], cpu["family"], cpu["model"]) if part)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", HERE, *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "HEAD") or "unknown"
    return head + (" with changes" if git("status", "--porcelain", "--", "../src", "../include", ".") else "")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short rounds; figures for a look, not for a page")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains TEXT")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--no-peers", action="store_true", help="vicus alone")
    parser.add_argument("--driver", type=Path, default=HERE.parent / "build/bench/bench/vicus_bench")
    parser.add_argument("--problems", type=Path, default=HERE / "problems_cpu.json")
    parser.add_argument(
        "--out", type=Path, help="default: results/cpu/<processor>.json, nothing with --quick or --only"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    problems = [p for p in json.loads(arguments.problems.read_text())["problems"] if arguments.only in p["name"]]
    if not problems:
        raise SystemExit(f"bench: --only is {arguments.only}; allowed: part of a name in {arguments.problems.name}")
    quick, threads = arguments.quick, arguments.threads
    rounds = arguments.rounds or (2 if quick else 5)
    timing = {
        "repeats": 2 if quick else 3,
        "least_seconds": 0.1 if quick else 0.3,
        "most_seconds": SLOW_SECONDS,
        "longest_mask": 2**14,
    }
    vicus_timing = {k: v for k, v in timing.items() if k != "longest_mask"}
    started, load_before, measured_commit = datetime.datetime.now(datetime.UTC), os.getloadavg()[0], commit()
    if load_before > 0.5:
        print(f"bench: the machine is busy (load {load_before:.1f}); times will be too long", file=sys.stderr)
    driver = Driver(arguments.driver, arguments.problems)
    peaks = driver.peak(threads)
    peers = None if arguments.no_peers else Peers(timing)
    rows: dict[tuple[str, str, int], Any] = {}
    try:
        versions = peers.ask({"versions": True}) if peers else {}
        for problem in problems:
            for number in range(rounds):
                print(f"bench: {problem['name']}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                for count in sorted({threads, 1} if problem.get("scaling") else {threads}):
                    measure_vicus(driver, rows, problem["name"], count, vicus_timing, check=number == 0)
                if peers:
                    measure_peers(peers, rows, problem, threads)
    finally:
        if peers:
            peers.close()
    cpu = processor()
    finished = finish(rows)
    report = {
        "commit": measured_commit,
        "date": started.isoformat(timespec="seconds"),
        "cpu": {**cpu, "cores": len(os.sched_getaffinity(0))},
        "load_before": load_before,
        "threads": threads,
        "rounds": rounds,
        "versions": {"vicus": driver.about, **versions},
        "peak": peaks,
        "rows": finished,
        "targets": judge(problems, finished, threads),
    }
    print_report(report)
    out = arguments.out or (None if quick or arguments.only else HERE / "results/cpu" / f"{slug(cpu)}.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten: {out.name}")


if __name__ == "__main__":
    main()

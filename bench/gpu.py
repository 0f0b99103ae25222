"""Measures vicus on this machine's GPU next to PyTorch's ways to compute the same, and writes what it found.

Run by `make gpu-bench` (GPU_BENCH_ARGS='--quick --only vit' for less). First what the GPU can do at all: a large matrix
product and a copy. README.md explains the columns.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_evidence
import gpu_report

HERE = Path(__file__).resolve().parent
ASLEEP = 8_000_000  # cycles: the GPU waits while calls are queued, so that their host time is not measured
LONG_SECONDS = 0.1  # a call this long is measured fewer times
# At its power limit a GPU slows down within a tenth of a second, and is slow for a while after: samples of calls that
# take a millisecond or more, ours and peers', begin after a rest, a longer one where the samples before took longer.
REST_SECONDS, RESTED_SECONDS = 0.5, 1e-3
REST_FOR_EACH, MOST_REST = 2.0, 4.0  # second of samples before; seconds at most
MOST_WARMING = 16  # processes that compile ahead at the same time
# Problems whose first call is measured, in processes of their own.
FIRST_CALLS = ("dense-16k-d128", "vit56-w7", "3d-8x32x32")


class Rest:
    """What the GPU did before the next samples."""

    def __init__(self) -> None:
        self.busy = 0.0

    def seconds(self) -> float:
        return min(REST_SECONDS + REST_FOR_EACH * self.busy, MOST_REST)


rest = Rest()


def gpu_seconds(call: Callable[[], Any], samples: int) -> dict[str, Any]:
    """Time on the GPU of single calls, which were all queued before the first one began."""
    import torch

    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    if took > LONG_SECONDS:
        samples = min(samples, 5)
    if took > RESTED_SECONDS:
        time.sleep(rest.seconds())
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    call()
    torch.cuda._sleep(ASLEEP)
    for first, last in events:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    times = [first.elapsed_time(last) * 1e-3 for first, last in events]
    rest.busy = sum(times)
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "samples": samples}


def host_seconds(call: Callable[[], Any], calls: int = 300, rounds: int = 7) -> float:
    """Time that the caller is busy with one call; the smallest mean of several rounds."""
    import torch

    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return best


def ceilings(samples: int) -> dict[str, float]:
    """Floating-point operations and bytes in a second, as PyTorch's own matrix product and copy reach them."""
    import torch

    n, found = 8192, {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_flops"] = 2 * n**3 / gpu_seconds(functools.partial(torch.mm, a, b), samples)["median"]
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["copy_bytes"] = 2 * source.numel() / gpu_seconds(lambda: target.copy_(source), samples)["median"]
    return found


def measured(call: Callable[[], Any], samples: int) -> dict[str, Any]:
    """Times, or the reason why there are none: `unsupported` is what PyTorch or vicus said."""
    try:
        return {"seconds": gpu_seconds(call, samples)}
    except Exception as error:  # a compiler's own kinds among them
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"unsupported": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}


def measure_peers(problem: dict[str, Any], inputs: Any, rows: dict[str, Any], ours: Any, arguments: Any) -> None:
    import gpu_calls
    import torch

    for name in problem.get("peers", []):
        if name in arguments.without:
            continue
        torch.compiler.reset()
        begin = time.monotonic()
        peer = measured_peer = None
        try:
            peer = (gpu_calls.OtherEngine if name == "sm80" else gpu_calls.Peer)(problem, name, inputs)
            close = None
            if name == "flex" or problem["mask"] == "dense":
                found, wanted = peer.result().float(), ours.flatten(1, -3).float()
                close = float((found - wanted).abs().max() / wanted.abs().max())
        except Exception as error:  # whatever PyTorch says is the reason
            measured_peer = {"unsupported": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]}
        print(f"bench: {name} is ready after {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        for way in ("forward", "backward"):
            if way not in rows:
                continue
            answer = measured_peer or measured(peer.calls()[way], arguments.samples)
            if peer is not None and way == "forward" and measured_peer is None:
                answer["largest_difference"] = close
                if peer.pairs is not None and peer.pairs != round(rows["forward"]["mask_pairs"]):
                    mine = rows["forward"]["mask_pairs"]
                    raise SystemExit(f"bench: {problem['name']}: {name} computes {peer.pairs} pairs, vicus {mine:.0f}")
            rows[way]["peers"][name] = answer
        del peer
        torch.cuda.empty_cache()


def measure(problem: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per pass."""
    import gpu_calls
    import torch

    rows: dict[str, dict[str, Any]] = {}
    if "operator" in problem:
        try:
            calls, moved = gpu_calls.operator_calls(problem)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return [{"problem": problem["name"], "pass": "forward", "unsupported": str(error).splitlines()[0][:300]}]
        for way, call in calls.items():
            rows[way] = {"bytes": moved[way], "flops": 0.0, **measured(call, arguments.samples)}
    else:
        inputs = gpu_calls.Inputs(problem)
        calls = gpu_calls.vicus_calls(problem, inputs)
        for way, call in calls.items():
            rows[way] = {**gpu_calls.plan_of(problem, inputs, way), **measured(call, arguments.samples), "peers": {}}
        ours = gpu_calls.forward(problem, *inputs.sets[0][:3])
        measure_peers(problem, inputs, rows, ours, arguments)
    torch.cuda.empty_cache()
    return [
        {"problem": problem["name"], "pass": way, "dtype": problem.get("dtype", "bfloat16"), **row}
        for way, row in rows.items()
    ]


def host_times() -> dict[str, float]:
    """Of a small problem, in seconds: vicus through its public function and as an operator, and PyTorch's attention."""
    import torch
    import torch.nn.functional as F

    import vicus
    from vicus import _ops

    q, k, v = (torch.randn(1, 16, 16, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in flat]
    mask = [7, 7, 1, 1, 1, 1, 0, 0]
    calls = {
        "na2d": lambda: vicus.na2d(q, k, v, 7),
        "attention": lambda: vicus.attention(*flat),
        "operator": lambda: _ops.neighborhood_inference(q, k, v, mask, 0.125),
        "sdpa": lambda: F.scaled_dot_product_attention(*heads_first),
    }
    with torch.no_grad():
        found = {name: host_seconds(call) for name, call in calls.items()}
    return found


def first_calls(names: list[str], problems: Path) -> dict[str, Any]:
    """Seconds of first calls: with an empty disk cache, and then, in a new process, with a full one. Kernels that were
    built ahead (VICUS_PREBUILT_DIR) would be neither."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "VICUS_PREBUILT_DIR"}
        environment["VICUS_CACHE_DIR"] = folder
        command = [sys.executable, str(HERE / "gpu_first_call.py"), str(problems), *names]
        found = {}
        for state in ("compiled", "from_disk"):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return {"error": done.stderr.strip().splitlines()[-1][:300] if done.stderr else "no word"}
            found[state] = json.loads(done.stdout)
    return found


def warm_up(problems: list[dict[str, Any]], arguments: argparse.Namespace, seconds: float) -> None:
    """Compiles what will be measured, in one process per problem: kernels of vicus and of FlexAttention, which end up
    in caches on the disk. Nothing is timed meanwhile; what fails is reported when it is measured."""
    deadline = time.monotonic() + seconds

    def run(problem: dict[str, Any]) -> None:
        command = [sys.executable, str(HERE / "gpu.py"), "--warm", problem["name"]]
        command += ["--problems", str(arguments.problems), *(f"--without={name}" for name in arguments.without)]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=max(0.1, deadline - time.monotonic()), check=False, **silent)

    # Not all at once: each has its tensors on the device. Those that compile for longest go first.
    order = sorted(problems, key=lambda problem: "flex" not in problem.get("peers", []))
    with concurrent.futures.ThreadPoolExecutor(min(MOST_WARMING, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(run, order))


def warm(problem: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Every call of a problem, once."""
    import gpu_calls

    if "operator" in problem:
        for call in gpu_calls.operator_calls(problem)[0].values():
            call()
        return
    inputs = gpu_calls.Inputs(problem)
    inputs.sets = inputs.sets[:1]
    for call in gpu_calls.vicus_calls(problem, inputs).values():
        call()
    for name, kind in (("sm80", gpu_calls.OtherEngine), ("flex", gpu_calls.Peer)):
        if name in problem.get("peers", []) and name not in arguments.without:
            for call in kind(problem, name, inputs).calls().values():
                call()


def take_over(report: dict[str, Any], known: dict[str, Any], problems: list[dict[str, Any]]) -> None:
    """Puts what an earlier run measured into the report of this one: problems of which nothing failed."""
    rows = known.get("rows", [])
    names = {problem["name"] for problem in problems} - {row["problem"] for row in rows if "unsupported" in row}
    report["rows"] = [row for row in rows if row["problem"] in names]
    if report["rows"]:
        report["runs"] = gpu_evidence.origins(known, report)
    for name in ("host_seconds", "first_calls"):
        if name in known:
            report[name] = known[name]


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples; figures for a look, not for a page")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains TEXT")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PEER", help="flex, cudnn, ...: as last measured"
    )
    parser.add_argument("--no-host", action="store_true", help="measure no first calls and host times")
    parser.add_argument("--warm-seconds", type=float, default=100.0, help="limit of compiling ahead; 0: do not")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds of these very kernels")
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    parser.add_argument("--survey", action="store_true", help="shapes of many models, to find where a peer is ahead")
    parser.add_argument("--problems", type=Path, help="default: problems_gpu.json, or problems_survey.json")
    parser.add_argument(
        "--out", type=Path, help="default: results/<gpu>/bench.json, or survey.json; nothing with --quick or --only"
    )
    arguments = parser.parse_args(given)
    arguments.samples = 5 if arguments.quick else 11
    arguments.kind = "survey" if arguments.survey else "bench"
    arguments.problems = arguments.problems or HERE / f"problems_{'survey' if arguments.survey else 'gpu'}.json"
    arguments.no_host = arguments.no_host or arguments.survey
    return arguments


def main() -> int:
    arguments = parse_arguments()
    told = json.loads(arguments.problems.read_text())
    every = [{**told.get("defaults", {}), **problem} for problem in told["problems"]]
    problems = [p for p in every if arguments.only in p["name"]]
    if not problems:
        raise SystemExit(f"bench: --only is {arguments.only}; allowed: part of a name in {arguments.problems.name}")
    import torch

    if not torch.cuda.is_available():
        print("gpu-bench: PyTorch finds no GPU here", file=sys.stderr)
        return 1
    if arguments.warm:
        warm(next(p for p in every if p["name"] == arguments.warm), arguments)
        return 0
    begin = time.monotonic()

    def say(what: str) -> None:
        print(f"bench: {time.monotonic() - begin:5.1f} s: {what}", file=sys.stderr, flush=True)

    report = gpu_evidence.provenance()
    keeps = bool(arguments.out or arguments.resume or not (arguments.quick or arguments.only))
    before = gpu_evidence.earlier(report, arguments.kind, arguments.out, any_kernels=True)
    if arguments.resume:
        take_over(report, gpu_evidence.earlier(report, arguments.kind, arguments.out), every)
        known = {row["problem"] for row in report["rows"]}
        problems = [p for p in problems if p["name"] not in known]
        say(f"{len(known)} problems are known, {len(problems)} to measure")
    if arguments.warm_seconds and problems:
        say("compiling ahead")
        warm_up(problems, arguments, arguments.warm_seconds)
    say("ceilings")
    report["ceilings"] = ceilings(arguments.samples)
    report["published"] = told.get("published", {})
    report.setdefault("rows", [])
    for problem in problems:
        say(problem["name"])
        try:
            report["rows"] += measure(problem, arguments)
        except RuntimeError as error:  # one problem must not cost the others
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
            report["rows"].append({"problem": problem["name"], "pass": "forward", "unsupported": reason})
        if keeps:  # a run that is cut short leaves what it has
            gpu_evidence.write(report, arguments.kind, arguments.out)
    if not arguments.no_host and "host_seconds" not in report:
        say("host times")
        try:
            report["host_seconds"] = host_times()
        except RuntimeError as error:
            say(f"no host times: {error}")
        asked = every if arguments.resume else problems
        names = [name for name in FIRST_CALLS if name in {p["name"] for p in asked}] or [asked[0]["name"]]
        report["first_calls"] = first_calls(
            [n for n in names if "operator" not in next(p for p in every if p["name"] == n)], arguments.problems
        )
    gpu_evidence.keep_peers(report, before, arguments.without)
    order = [problem["name"] for problem in every]
    report["rows"].sort(key=lambda row: order.index(row["problem"]))
    gpu_report.finish(report, every if arguments.resume else problems)
    report["seconds"] = round(time.monotonic() - begin, 1)
    gpu_report.print_report(report)
    if keeps:
        print(f"\nwritten: {gpu_evidence.write(report, arguments.kind, arguments.out).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the tests that need a GPU, then the sanitizers, and writes what came out to results/<gpu>/test.json.

Sanitizers alone (--sanitize-only) have a file of their own, sanitize.json.

Run by `make gpu-test` (GPU_TEST_ARGS='--sanitize --gpu-cases 2000' for more). Tests share the GPU, a process for each
core, because most of their time goes into compiling kernels; those marked `alone` follow by themselves.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_evidence

TESTS = gpu_evidence.ROOT / "tests"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Tests that share the GPU, those that have it alone, and those of the package, where no tests are named.
RUNS = ("together", "alone", "package")
# Kernel tests, and those of the package that compile FlexAttention or compare with cuDNN.
DEFAULT_TESTS = ("tests/gpu", "tests/torch/test_flex_gpu.py", "tests/nn/test_layer_gpu.py")
# Tests of the package that run with CUDA tensors when they are told to (--device).
ANY_DEVICE = tuple(f"tests/torch/test_{name}.py" for name in ("functional", "composite", "unfused_torch"))
# But for one that compiles for dozens of random problems; tests/gpu/test_gpu_unfused.py has such problems, too.
LONG = "tests/torch/test_unfused_torch.py::test_oracle"
# The tests of kernel texts, which need no GPU and run in `make test`.
NEED_NO_GPU = ("tests/gpu/test_specs.py",)
# Tests of what a machine may not have beside the package, by the variable that names it.
NEED_MORE = {"VICUS_CLI": ("tests/gpu/test_gpu_cli.py",), "VICUS_CONTEXTS": ("tests/gpu/test_gpu_contexts.py",)}


def read_progress(path: Path) -> dict[str, Any]:
    """Counts of what gpu_progress.py noted, names of what failed, and the slowest tests."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "reasons": [], "slowest": []}
    found["ran"] = []
    times = []
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        found[entry["outcome"]] += 1
        found["ran"].append(entry["test"])
        if entry["outcome"] == "failed":
            message = entry["message"].replace(str(gpu_evidence.ROOT), ".")
            found["failures"].append({"test": entry["test"], "message": message[:400]})
        elif entry["outcome"] == "skipped":
            found["reasons"].append(entry["message"])
        times.append((entry["seconds"], entry["test"]))
    found["slowest"] = [{"test": name, "seconds": round(t, 1)} for t, name in sorted(times, reverse=True)[:5]]
    found["reasons"] = sorted(set(found["reasons"]))
    return found


def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(part[name] for part in parts) for name in ("passed", "failed", "skipped")}
    total["failures"] = [failure for part in parts for failure in part["failures"]]
    total["skip_reasons"] = sorted({reason for part in parts for reason in part["reasons"]})
    slowest = [entry for part in parts for entry in part["slowest"]]
    total["slowest"] = sorted(slowest, key=lambda entry: -entry["seconds"])[:5]
    total["ran"] = [name for part in parts for name in part.get("ran", [])]
    return total


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The counts of two runs. Left out is what neither ran; what failed in the first and ran again counts once, and so
    does what a part had done that did not end and ran again."""
    ran = {place for name in second.get("ran", []) for place in (name, name.split("::")[0])}  # tests, and their files
    again = [failure for failure in first["failures"] if failure["test"] in ran]
    kept = [failure for failure in first["failures"] if failure not in again]
    counts = {name: first[name] - sum(failure.get(name, 0) for failure in again) for name in ("passed", "skipped")}
    parts = [first | counts | {"failures": kept, "failed": first["failed"] - len(again)}, second]
    left = {path: why for path, why in first["left_out"].items() if path in second["left_out"]}
    total = combine([part | {"reasons": part["skip_reasons"]} for part in parts]) | {"left_out": left}
    return total | {"ran_again": [*first.get("ran_again", []), *again]}


def left_out() -> dict[str, str]:
    """Test files that cannot run, and why."""
    missing = {name: paths for name, paths in NEED_MORE.items() if name not in os.environ}
    return {path: f"{name} is not set" for name, paths in missing.items() for path in paths}


def run_for(seconds: float, command: list[str], **options: Any) -> int | None:
    """Exit status; None where it had to be stopped, with all processes that it had started."""
    child = subprocess.Popen(command, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        return child.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return None


def run_pytest(
    arguments: argparse.Namespace, name: str, given: list[str], logs: Path, workers: int = 1
) -> dict[str, Any]:
    """One run of pytest. A run that did not end by itself is a failure of its own, beside what it had found."""
    progress, log = logs / f"progress-{name}.jsonl", logs / f"pytest-{name}.log"
    progress.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_progress"]
    command += [f"--ignore={path}" for path in [*NEED_NO_GPU, *left_out()]]
    command += ["--continue-on-collection-errors", *given, *arguments.pytest]
    search = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"VICUS_TEST_PROGRESS": str(progress), "PYTHONPATH": search}
    environment.pop("PYTEST_XDIST_WORKER", None)  # where this runs inside a test
    # Oracles compute on the CPU, too: as many threads as there are cores, in every process, would only get in each
    # other's way.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    with log.open("w") as out:
        left = arguments.deadline - time.monotonic()
        code = run_for(left, command, cwd=gpu_evidence.ROOT, stdout=out, env=environment)
    tail = log.read_text(errors="replace").splitlines()[-60:]
    print("\n".join(tail), flush=True)
    found = read_progress(progress)
    if code not in (0, 5) and not (code == 1 and found["failed"]):  # 5: no test has the mark
        how = "was stopped, time was up" if code is None else f"ended with {code}"
        found["failed"] += 1
        done = {outcome: found[outcome] for outcome in ("passed", "skipped")}
        found["failures"].append({"test": f"pytest, {name}", "message": how, **done})
    else:
        found["ran"].append(f"pytest, {name}")
    for failure in found["failures"]:
        print(f"FAILED {failure['test']}: {failure['message'].splitlines()[:1]}", flush=True)
    return found


def read_sanitizer(text: str) -> dict[str, Any]:
    """What compute-sanitizer says in the end: `ERROR SUMMARY: 0 errors`, or of racecheck hazards."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*", text)
    problems = [line.strip() for line in text.splitlines() if line.startswith("=========")]
    first = [line for line in problems if not re.search(r"COMPUTE-SANITIZER|SUMMARY", line)][:12]
    finished = bool(re.search(r"^done$", text, re.MULTILINE))
    return {"errors": int(summary[-1]) if summary else None, "finished": finished, "first": first}


def sanitize(logs: Path, seconds: float) -> dict[str, Any]:
    """Every tool over the problems of tests/gpu/sanitize.py, at the same time."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    script = [sys.executable, str(TESTS / "gpu" / "sanitize.py")]
    if not Path(program).exists():
        return {"error": "compute-sanitizer is not installed"}
    # Compiles what the tools will run, and compares it.
    begin = time.monotonic()
    with (logs / "sanitize-plain.log").open("w") as out:
        compared = run_for(seconds, script, stdout=out) == 0
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(tool: str) -> dict[str, Any]:
        command = [program, "--tool", tool, "--print-limit", "20", *script, "--run-only"]
        log = logs / f"sanitize-{tool}.log"
        with log.open("w") as out:
            run_for(seconds - (time.monotonic() - begin), command, stdout=out, env=environment)
        found = read_sanitizer(log.read_text(errors="replace"))
        print(f"{tool}: {found['errors']} errors{'' if found['finished'] else ', did not finish'}", flush=True)
        return found

    with concurrent.futures.ThreadPoolExecutor(len(TOOLS)) as pool:
        results = dict(zip(TOOLS, pool.map(run, TOOLS), strict=True))
    return {"compared": compared, "seconds": round(time.monotonic() - begin, 1), "tools": results}


def run_tests(arguments: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Tests that share the GPU, those that want it for themselves, and those of the package that take any device."""
    workers = arguments.workers or min(16, len(os.sched_getaffinity(0)))
    if importlib.util.find_spec("xdist") is None:
        print("gpu-test: pytest-xdist is not installed: one process, which takes long", file=sys.stderr)
        workers = 1
    chosen = [f"--gpu-cases={arguments.gpu_cases}", *(arguments.tests or DEFAULT_TESTS)]
    together = ["-n", str(workers)] if workers > 1 else []
    runs = {"together": (["-m", "not alone", *together, *chosen], workers), "alone": (["-m", "alone", *chosen], 1)}
    runs["package"] = (["--device=cuda", f"--deselect={LONG}", *together, *ANY_DEVICE], workers)
    wanted = arguments.run or (RUNS[:2] if arguments.tests else RUNS)
    parts = [run_pytest(arguments, name, runs[name][0], logs, runs[name][1]) for name in wanted]
    return combine(parts) | {"left_out": left_out()}


def add_earlier(report: dict[str, Any], known: dict[str, Any]) -> None:
    """Adds what an earlier run found: its tests to the counts, its sanitizers where these did not run."""
    if not known:
        return
    report["runs"] = gpu_evidence.origins(known, report)
    if "tests" in known:
        report["tests"] = joined(known["tests"], report["tests"]) if "tests" in report else known["tests"]
    if "sanitizers" in known:
        report.setdefault("sanitizers", known["sanitizers"])
    report["seconds"] = round(report["seconds"] + known["seconds"], 1)


def clean(report: dict[str, Any]) -> bool:
    """Whether everything that ran was right."""
    found = report.get("sanitizers")
    tools = found.get("tools", {}) if found else {}
    sane = not found or (
        tools and found["compared"] and all(t["errors"] == 0 and t["finished"] for t in tools.values())
    )
    tests = report.get("tests")
    return bool(sane and (not tests or (tests["failed"] == 0 and tests["passed"] > 0)))


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="append", choices=RUNS, help="only this part of the tests, and others so named")
    parser.add_argument("--gpu-cases", type=int, default=250, help="random problems (each in several variations)")
    parser.add_argument("--workers", type=int, default=0, help="test processes; default: as many as cores, at most 16")
    parser.add_argument("--sanitize", action="store_true", help="then run the sanitizers, too")
    parser.add_argument("--sanitize-only", action="store_true", help="run nothing but the sanitizers")
    parser.add_argument("--sanitize-seconds", type=float, default=400.0, help="limit of all of them")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit of the tests")
    parser.add_argument("--pytest", action="append", default=[], metavar="ARGUMENT", help="for pytest; --pytest=-k2d")
    parser.add_argument("--resume", action="store_true", help="add to what the result file holds of these very kernels")
    parser.add_argument("--out", type=Path, help="default: results/<gpu>/test.json")
    parser.add_argument("--logs", type=Path, help="folder of the whole output; default: a temporary one")
    parser.add_argument("tests", nargs="*", help=f"default: {' '.join(DEFAULT_TESTS)}")
    arguments = parser.parse_args(given)
    arguments.deadline = time.monotonic() + arguments.seconds
    return arguments


def main() -> int:
    arguments = parse_arguments()
    import torch

    if not torch.cuda.is_available():
        print("gpu-test: PyTorch finds no GPU here", file=sys.stderr)
        return 1
    begin = time.monotonic()
    report = gpu_evidence.provenance()
    kind = "sanitize" if arguments.sanitize_only else "test"
    known = gpu_evidence.earlier(report, kind, arguments.out) if arguments.resume else {}
    with tempfile.TemporaryDirectory() as temporary:
        logs = arguments.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        if not arguments.sanitize_only:
            report["gpu_cases"] = arguments.gpu_cases
            report["tests"] = run_tests(arguments, logs)
        if arguments.sanitize or arguments.sanitize_only:
            report["sanitizers"] = sanitize(logs, arguments.sanitize_seconds)
    report["seconds"] = round(time.monotonic() - begin, 1)
    add_earlier(report, known)
    report.get("tests", {}).pop("ran", None)  # thousands of names
    path = gpu_evidence.write(report, kind, arguments.out)
    tests = report.get("tests", {"passed": 0, "failed": 0, "skipped": 0})
    print(f"written: {path.name}, {report['seconds']} s")
    print(f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
    return 0 if clean(report) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What `make gpu-test` and `make gpu-bench` make of what they measured. Needs no GPU."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import gpu
import gpu_calls
import gpu_evidence
import gpu_report
import gpu_test
import pytest

BENCH = Path(gpu.__file__).parent
TOLD = json.loads((BENCH / "problems_gpu.json").read_text())
PROBLEMS = TOLD["problems"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_folder_of_a_device(name, slug):
    assert gpu_evidence.slug(name) == slug


def test_digest_is_of_what_is_compiled(tmp_path, monkeypatch):
    texts = gpu_evidence.device_texts()
    assert {"geometry.h", "forward.cu", "mma.cuh", "args.h"} <= {path.name for path in texts}
    assert all(path.suffix != ".cc" for path in texts)
    before = gpu_evidence.kernel_digest()
    copy = tmp_path / "copy"
    for folder in ("src/gpu", "include/vicus"):
        shutil.copytree(gpu_evidence.ROOT / folder, copy / folder)
    monkeypatch.setattr(gpu_evidence, "ROOT", copy)
    assert gpu_evidence.kernel_digest() == before
    (copy / "src/gpu/engine.cc").write_text("// host code\n")
    assert gpu_evidence.kernel_digest() == before
    kernel = copy / "src/gpu/forward.cu"
    kernel.write_text(kernel.read_text() + "\n")
    assert gpu_evidence.kernel_digest() != before


def test_results_of_other_kernels_are_named(tmp_path):
    report = {"gpu": {"name": "NVIDIA H100"}, "commit": "c" * 40, "date": "2026-01-02T03:04:05"}
    for kind, digest in (("test", gpu_evidence.kernel_digest()), ("bench", "0" * 64)):
        gpu_evidence.write(report | {"kernel_digest": digest}, kind, tmp_path / "h100" / f"{kind}.json")
    (line,) = gpu_evidence.stale(tmp_path)
    assert line.startswith("h100/bench.json") and "cccccccccccc, 2026-01-02" in line


HEAD = {
    "kernel_digest": "d",
    "gpu": {"name": "NVIDIA H100"},
    "versions": {"torch": "2"},
    "commit": "c",
    "date": "today",
}


@pytest.mark.parametrize("other", [{}, {"kernel_digest": "e"}, {"gpu": {"name": "NVIDIA H200"}}, {"versions": {}}])
def test_a_run_goes_on_only_on_the_same(tmp_path, other):
    out = tmp_path / "bench.json"
    assert gpu_evidence.earlier(HEAD, "bench", out) == {}
    gpu_evidence.write(HEAD | {"rows": [1]} | other, "bench", out)
    assert gpu_evidence.earlier(HEAD, "bench", out).get("rows") == (None if other else [1])


def test_a_bench_that_was_cut_goes_on():
    rows = [{"problem": "whole", "pass": way} for way in ("forward", "backward")]
    rows += [{"problem": "half", "pass": "forward"}, {"problem": "half", "pass": "backward", "unsupported": "memory"}]
    rows.append({"problem": "no longer asked", "pass": "forward"})
    report = HEAD | {"commit": "d"}
    known = HEAD | {"rows": rows, "host_seconds": {"na2d": 1e-5}}
    gpu.take_over(report, known, [{"name": "half"}, {"name": "whole"}, {"name": "new"}])
    assert report["rows"] == rows[:2]
    assert report["runs"] == [{"commit": "c", "date": "today"}, {"commit": "d", "date": "today"}]
    assert report["host_seconds"] == {"na2d": 1e-5} and "first_calls" not in report
    third = HEAD | {"commit": "e"}
    gpu.take_over(third, report, [{"name": "whole"}])
    assert [run["commit"] for run in third["runs"]] == ["c", "d", "e"]
    empty = dict(HEAD)
    gpu.take_over(empty, {}, [{"name": "whole"}])
    assert empty["rows"] == [] and "runs" not in empty


def test_a_peer_left_out_is_as_an_earlier_run_found_it(tmp_path):
    def row(way, **peers):
        return {"problem": "p", "pass": way, "peers": peers}

    found, other = {"seconds": {"median": 2.0}}, {"seconds": {"median": 3.0}}
    failed = {"unsupported": "memory"}
    before = HEAD | {
        "kernel_digest": "e",
        "commit": "b",
        "rows": [row("forward", flex=found, cudnn=found), row("backward", flex=failed)],
    }
    report = HEAD | {
        "rows": [row("forward", cudnn=other), row("backward", cudnn=other), {"problem": "q", "pass": "forward"}]
    }
    gpu_evidence.write(before, "bench", out := tmp_path / "bench.json")
    assert gpu_evidence.earlier(report, "bench", out) == {}
    gpu_evidence.keep_peers(report, gpu_evidence.earlier(report, "bench", out, any_kernels=True), ["flex"])
    kept = {"of": {"commit": "b", "date": "today"}, **found}
    assert report["rows"][0]["peers"] == {"cudnn": other, "flex": kept}
    assert [set(r.get("peers", {})) for r in report["rows"][1:]] == [{"cudnn"}, set()]
    measured = report["rows"][0] | {"seconds": {"median": 1.0}, "dtype": "float16", "flops": 1.0, "bytes": 1}
    gpu_report.finish_row(measured, {"float16_flops": 1.0, "copy_bytes": 1.0})
    assert (measured["best_peer"], measured["peer_ratio"]) == ("cudnn", 3.0), "of this run"


def counts_of(passed, failures, left_out):
    failed = [{"test": name, "message": "no"} for name in failures]
    counts = {"passed": passed, "failed": len(failed), "skipped": 0, "failures": failed, "skip_reasons": []}
    return counts | {"slowest": [{"test": "t", "seconds": float(passed)}], "left_out": left_out}


def test_tests_are_added_up():
    known = HEAD | {
        "seconds": 10.0,
        "tests": counts_of(3, ["a"], {"x": "no CLI", "y": "no"}),
        "sanitizers": {"tools": {}},
    }
    report = HEAD | {"seconds": 5.5, "tests": counts_of(7, [], {"x": "no CLI"})}
    gpu_test.add_earlier(report, known)
    total = report["tests"]
    assert (total["passed"], total["failed"], total["left_out"]) == (10, 1, {"x": "no CLI"})
    assert total["slowest"][0]["seconds"] == 7.0 and total["failures"][0]["test"] == "a"
    assert report["sanitizers"] == {"tools": {}} and report["seconds"] == 15.5 and len(report["runs"]) == 2
    repaired = HEAD | {"seconds": 1.0, "tests": counts_of(2, [], {}) | {"ran": ["a", "b"]}}
    gpu_test.add_earlier(repaired, report)
    assert (repaired["tests"]["passed"], repaired["tests"]["failed"], repaired["tests"]["failures"]) == (12, 0, [])
    assert [failure["test"] for failure in repaired["tests"]["ran_again"]] == ["a"]
    alone = HEAD | {"seconds": 1.0, "tests": counts_of(1, [], {})}
    gpu_test.add_earlier(alone, {})
    assert "runs" not in alone and alone["tests"]["passed"] == 1


def test_commit_of_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("VICUS_COMMIT", "abc")
    assert gpu_evidence.commit() == "abc"
    monkeypatch.delenv("VICUS_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert gpu_evidence.commit() == "unknown"


PROGRESS = [
    {"test": "a::right", "outcome": "passed", "seconds": 2.0},
    {"test": "a::wrong", "outcome": "failed", "seconds": 1.0, "message": f"off by one in {gpu_evidence.ROOT}/a"},
    {"test": "a::broken", "outcome": "failed", "seconds": 0.0, "message": "no"},
    {"test": "a::elsewhere", "outcome": "skipped", "seconds": 0.0, "message": "needs two GPUs"},
]


def test_counts_of_a_run(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in PROGRESS))
    total = gpu_test.combine([gpu_test.read_progress(path)] * 2)
    assert (total["passed"], total["failed"], total["skipped"]) == (2, 4, 2)
    assert total["failures"][0] == {"test": "a::wrong", "message": "off by one in ./a"}
    assert total["skip_reasons"] == ["needs two GPUs"]
    assert total["slowest"][0] == {"test": "a::right", "seconds": 2.0}
    assert total["ran"][:2] == ["a::right", "a::wrong"]
    assert not gpu_test.clean({"tests": total})
    assert gpu_test.clean({"tests": total | {"failed": 0}})
    assert not gpu_test.clean({"tests": total | {"failed": 0, "passed": 0}})


def test_a_file_that_cannot_be_read_is_a_failure_until_its_tests_run(tmp_path):
    file = tmp_path / "test_file.py"
    file.write_text("raise ValueError('no library')\n")
    arguments = gpu_test.parse_arguments([])
    runs = []
    for text in ("raise ValueError('no library')\n", "def test_right(): pass\n"):
        file.write_text(text)
        found = gpu_test.run_pytest(arguments, "file", [str(file)], tmp_path)
        runs.append(gpu_test.combine([found]) | {"left_out": {}})
    broken, mended = runs
    assert (broken["passed"], broken["failed"]) == (0, 1) and "no library" in broken["failures"][0]["message"]
    total = gpu_test.joined(broken, mended)
    assert (total["passed"], total["failed"], total["failures"]) == (1, 0, [])
    assert total["ran_again"] == broken["failures"]


def test_a_run_of_pytest_that_breaks_is_a_failure(tmp_path):
    arguments = gpu_test.parse_arguments(["--pytest=--no-such-option"])
    found = gpu_test.run_pytest(arguments, "broken", ["tests/gpu"], tmp_path)
    assert found["failed"] == 1 and "ended with 4" in found["failures"][0]["message"]


def test_a_run_that_is_cut_tells_what_it_found(tmp_path, monkeypatch):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_right(): pass\n"
        "def test_slow():\n    time.sleep(600)\n"
    )
    progress = tmp_path / "progress-cut.jsonl"

    class UntilTheSlowOne(subprocess.Popen):
        """Time is up when the other two are done, however long that takes."""

        def wait(self, timeout=None):
            while self.poll() is None and (not progress.exists() or progress.read_text().count("\n") < 2):
                time.sleep(0.05)
            return super().wait(timeout and 0.1)

    monkeypatch.setattr(subprocess, "Popen", UntilTheSlowOne)
    arguments = gpu_test.parse_arguments([])
    found = gpu_test.run_pytest(arguments, "cut", [str(tmp_path / "test_slow.py")], tmp_path)
    assert (found["passed"], found["failed"]) == (1, 2)
    assert "1 == 2" in found["failures"][0]["message"]
    assert found["failures"][1]["message"] == "was stopped, time was up"
    cut = gpu_test.combine([found]) | {"left_out": {}}
    (tmp_path / "test_slow.py").write_text("def test_wrong(): pass\ndef test_right(): pass\ndef test_slow(): pass\n")
    monkeypatch.undo()
    whole = gpu_test.run_pytest(arguments, "cut", [str(tmp_path / "test_slow.py")], tmp_path)
    total = gpu_test.joined(cut, gpu_test.combine([whole]) | {"left_out": {}})
    assert (total["passed"], total["failed"], total["failures"]) == (3, 0, [])
    assert total["ran_again"] == cut["failures"]


def test_parts_of_the_tests_run_by_their_names(tmp_path, monkeypatch):
    ran = []
    none = gpu_test.read_progress(tmp_path / "none")
    monkeypatch.setattr(gpu_test, "run_pytest", lambda arguments, name, *rest: ran.append(name) or none)
    for given in ([], ["tests/gpu"], ["--run=alone", "--run=package"]):
        gpu_test.run_tests(gpu_test.parse_arguments(given), tmp_path)
    assert ran == ["together", "alone", "package", "together", "alone", "alone", "package"]


def test_files_that_cannot_run_are_named(monkeypatch):
    for name in gpu_test.NEED_MORE:
        monkeypatch.setenv(name, "/bin/program")
    assert gpu_test.left_out() == {}
    for name in gpu_test.NEED_MORE:
        monkeypatch.delenv(name)
    paths = gpu_test.left_out()
    assert len(paths) == 2 and all((gpu_evidence.ROOT / path).is_file() for path in paths)
    assert all((gpu_evidence.ROOT / path).is_file() for path in gpu_test.NEED_NO_GPU)


def test_what_the_sanitizers_say():
    good = "done\n========= ERROR SUMMARY: 0 errors\n"
    hazard = (
        "========= Error: Race reported\ndone\n========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n"
    )
    cut = "========= COMPUTE-SANITIZER\n"
    tools = [gpu_test.read_sanitizer(text) for text in (good, hazard, cut)]
    assert [t["errors"] for t in tools] == [0, 3, None]
    assert [t["finished"] for t in tools] == [True, True, False]
    assert tools[1]["first"] == ["========= Error: Race reported"]
    for tool, right in zip(tools, (True, False, False), strict=True):
        assert gpu_test.clean({"sanitizers": {"compared": True, "tools": {"memcheck": tool}}}) is right
    assert not gpu_test.clean({"sanitizers": {"error": "compute-sanitizer is not installed"}})


def made_report():
    seconds = {"median": 0.01, "min": 0.009, "max": 0.011, "samples": 11}
    kernel = {"name": "forward of forward.cu", "threads": 128, "registers": 200, "local_bytes": 0}
    kernel |= {"shared_bytes": 70000, "blocks_per_multiprocessor": 2}
    rows = []
    for problem in PROBLEMS:
        for way in problem.get("passes", ("forward", "backward")):
            row = {"problem": problem["name"], "pass": way, "dtype": problem.get("dtype", "bfloat16"), "flops": 4e12}
            row |= {"bytes": 3e9, "seconds": seconds, "work_ratio": 1.5, "kernels": [kernel]}
            row["peers"] = {"flash": {"seconds": seconds | {"median": 0.02}}, "flex": {"unsupported": "no such thing"}}
            rows.append(row)
    rows.append({"problem": "other", "pass": "forward", "unsupported": "RuntimeError: no"})
    return {
        "gpu": {"name": "NVIDIA H100", "driver": "1"},
        "versions": {"torch": "2"},
        "commit": "c",
        "published": TOLD["published"],
        "ceilings": {"bfloat16_flops": 8e14, "float32_flops": 5e13, "copy_bytes": 3e12},
        "rows": rows,
        "host_seconds": {"na2d": 9e-6, "attention": 30e-6, "operator": 5e-6, "sdpa": 10e-6},
        "first_calls": {
            "compiled": {"process": {"forward": 2.0}, "vit56-w7": {"forward": 0.7}},
            "from_disk": {"vit56-w7": {"forward": 0.03}},
        },
    }


def test_floors_and_targets(capsys):
    report = made_report()
    gpu_report.finish(report, PROBLEMS)
    row = report["rows"][0]
    assert row["tflops"] == pytest.approx(400) and row["share_of_matmul"] == pytest.approx(0.5)
    assert row["floors"] == pytest.approx({"flops": 0.005, "bytes": 0.001})
    assert row["times_floor"] == pytest.approx(2) and row["times_memory_floor"] == pytest.approx(10)
    assert (row["best_peer"], row["peer_ratio"]) == ("flash", pytest.approx(2))
    met = {(t["problem"], t["pass"], t["what"]): t["met"] for t in report["targets"]}
    assert row["executed_tflops"] == pytest.approx(600)
    assert met["dense-16k-d128", "forward", "TFLOP/s"] is False
    assert met["dense-16k-d128", "backward", "TFLOP/s"] is True
    assert met["dense-16k-d128", "forward", "times the best peer"] is True
    assert met["flux-na", "forward", "milliseconds"] is True and met["flux-gna", "forward", "milliseconds"] is False
    assert met["vit56-w7", "forward", "times memory floor"] is False
    assert met["vit56-w7", "forward", "seconds, first call"] is True
    assert met["vit56-w7", "forward", "seconds, first call from disk"] is False
    assert met["na2d", "forward", "times SDPA's host time"] is True
    assert met["attention", "forward", "times SDPA's host time"] is False
    assert len([t for t in report["targets"] if "spills" in t["what"]]) == 0
    report["rows"][0]["kernels"][0]["local_bytes"] = 8
    spills = [t for t in gpu_report.judge(PROBLEMS, report["rows"], report) if "spills" in t["what"]]
    assert spills and spills[0]["met"] is False
    gpu_report.print_report(report)
    text = capsys.readouterr().out
    assert "SHORT" in text and "RuntimeError: no" in text and "10.00 ms" in text
    assert "hunyuan-na forward natten: 75.60 ms, ratio 7.56" in text and "hunyuan-na deterministic" not in text


def test_time_for_the_work_of_another_problem():
    report = made_report()
    rows = {(row["problem"], row["pass"]): row for row in report["rows"]}
    rows["flux-na-dilated", "forward"]["flops"] = 3.5e12  # of 4e12 in the same time
    gpu_report.finish(report, PROBLEMS)
    met = {t["problem"]: (t["measured"], t["met"]) for t in report["targets"] if "flux-na per work" in t["what"]}
    assert met == {"flux-na-dilated": (pytest.approx(8 / 7), False), "flux-na-causal": (pytest.approx(1), True)}
    report["rows"] = [rows["flux-na-causal", "forward"]]  # --only
    del report["rows"][0]["slowdown"]
    gpu_report.finish(report, PROBLEMS)
    assert {t["met"] for t in report["targets"] if "flux-na per work" in t["what"]} == {None}


def test_targets_of_what_was_not_measured():
    report = {**made_report(), "rows": [], "first_calls": {}, "host_seconds": None}
    gpu_report.finish(report, PROBLEMS)
    assert report["targets"] and all(t["met"] is None for t in report["targets"])


def test_arguments():
    arguments = gpu.parse_arguments(["--quick", "--only", "vit", "--without", "flex"])
    assert arguments.samples < gpu.parse_arguments([]).samples
    assert arguments.without == ["flex"]
    assert set(gpu.FIRST_CALLS) <= {p["name"] for p in PROBLEMS}
    with pytest.raises(SystemExit):
        gpu_test.parse_arguments(["--gpu-cases", "many"])


def test_problems_are_complete():
    assert len({p["name"] for p in PROBLEMS}) == len(PROBLEMS)
    for p in PROBLEMS:
        assert ("operator" in p) != ("mask" in p)
        assert {"layout", "batch", "heads", "head_dim"} <= p.keys()
        if p.get("mask") == "neighborhood":
            for name in {"kernel_size", "stride", "dilation", "causal_axes"} & p.keys():
                assert len(p[name]) == len(p["layout"])
        passes = p.get("passes", ["forward", "backward"])
        assert p.get("targets", {}).keys() <= set(passes) <= {"forward", "backward", "deterministic"}
        assert p.get("same_as") in {None, *(other["name"] for other in PROBLEMS)}
        for name, times in p.get("published", {}).items():
            assert name in TOLD["published"] and times.keys() <= {"forward", "backward"}


def test_the_survey_asks_for_what_there_is():
    told = json.loads((BENCH / "problems_survey.json").read_text())
    every = [{**told["defaults"], **problem} for problem in told["problems"]]
    assert len({p["name"] for p in every}) == len(every)
    for p in every:
        queries, keys, *_ = gpu_calls.shapes_of(p)
        assert queries[0] == keys[0] and queries[-2] % keys[-2] == 0
        assert keys[1] == p.get("keys", queries[1])
        assert set(p["passes"]) <= set(gpu_calls.PASSES) and set(p["peers"]) <= set(gpu_calls.SDPA)
        assert p["mask"] == "dense" or len(p["kernel_size"]) == len(p["layout"])
    decoding = [p for p in every if p["passes"] == ["forward"]]
    assert decoding and all(t["pass"] == "forward" for t in gpu_report.judge(decoding, [], {})), "what is not run"
    arguments = gpu.parse_arguments(["--survey"])
    assert arguments.kind == "survey" and arguments.no_host and arguments.problems.name == "problems_survey.json"
    assert gpu.parse_arguments([]).kind == "bench"

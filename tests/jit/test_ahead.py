"""`vicus compile`: a directory of kernels that another process needs no compiler for."""

import json
import os
import pathlib
import subprocess

import pytest
from probe import CLEAN, FAKE_CUDA, FAKE_NVRTC

VICUS = os.environ["VICUS_CLI"]
LAYER = ["--layout", "30", "40", "--heads", "4", "--kernel-size", "7", "--dtype", "bfloat16"]
BIASED = [*LAYER, "--rpb", "--additional-tokens", "3"]
WIDE = [*LAYER, "--head-dim", "128"]  # has both ways of gradients; small windows of less have one


@pytest.fixture
def place(tmp_path):
    return {
        "VICUS_NVRTC": FAKE_NVRTC,
        "VICUS_CACHE_DIR": tmp_path / "cache",
        "VICUS_CUDA_DRIVER": tmp_path / "absent",
        "FAKE_NVRTC_LOG": tmp_path / "compiled",
    }


def start(*arguments, environment):
    return subprocess.Popen(
        [VICUS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN | {name: str(value) for name, value in environment.items()},
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def report_of(*arguments, environment):
    code, out, err = finish(start("compile", *arguments, "--json", environment=environment))
    assert (code, err) == (0, "")
    return json.loads(out)


def refuse(*arguments, environment, naming, code=2):
    done = finish(start("compile", *arguments, environment=environment))
    assert done[0] == code, done
    assert done[1] == ""
    assert done[2].count("\n") == 1
    for part in naming:
        assert part in done[2]


def names(report):
    return sorted({kernel["kernel"] for kernel in report["kernels"]})


def compilations(place):
    log = pathlib.Path(place["FAKE_NVRTC_LOG"])
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_every_kernel_of_a_problem(place, tmp_path):
    report = report_of(*BIASED, "-o", tmp_path / "kernels", "--arch", "sm_80", environment=place)
    assert names(report) == [
        "backward_bias.cu",
        "backward_convert.cu",
        "backward_delta.cu",
        "backward_keys.cu",
        "backward_queries.cu",
        "forward.cu",
    ]
    assert report["skipped"] == []
    count = len(report["kernels"])
    assert count == compilations(place) == len(list((tmp_path / "kernels").iterdir()))
    for kernel in report["kernels"]:
        assert (kernel["arch"], kernel["registers"], kernel["spill_bytes"]) == ("sm_80", 40, 12)
        assert kernel["shared_bytes"] >= 100
        assert not kernel["from_cache"]
        assert kernel["problem"] == "the problem"
    again = report_of(*BIASED, "-o", tmp_path / "kernels", "--arch", "sm_80", environment=place)
    assert all(kernel["from_cache"] for kernel in again["kernels"])
    assert [k["kernel"] for k in again["kernels"]] == [k["kernel"] for k in report["kernels"]]
    assert compilations(place) == count


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (["--forward", "plain", "--backward", "none"], ["forward.cu"]),
        (["--forward", "lse", "--backward", "none", "--rows", "both"], ["forward.cu"] * 2),
        (["--backward", "none"], ["forward.cu"] * 2),
        (["--backward", "none", "--rows", "both"], ["forward.cu"] * 4),
        (["--forward", "none", "--backward", "deterministic"], ["delta", "queries", "keys"]),
        (["--forward", "none", "--backward", "parallel"], ["delta", "keys", "convert"]),
        (["--forward", "none"], ["delta", "keys", "convert", "queries", "keys"]),
    ],
)
def test_calls_that_are_asked_for(place, tmp_path, options, kernels):
    machine = place | {"VICUS_CUDA_DRIVER": FAKE_CUDA}  # one kind of GPU of each architecture
    report = report_of(*WIDE, "-o", tmp_path / "kernels", *options, environment=machine)
    full = [name if name == "forward.cu" else f"backward_{name}.cu" for name in kernels]
    for arch in ("sm_80", "sm_90"):
        assert [kernel["kernel"] for kernel in report["kernels"] if kernel["arch"] == arch] == full


@pytest.mark.parametrize(
    ("rows", "kernels"),
    # The second is for aligned tensors that the copy engine cannot address.
    [("aligned", {"sm90_forward.cu", "forward.cu"}), ("unaligned", {"forward.cu"})],
)
def test_forward_kernels_of_the_faster_engine(place, tmp_path, rows, kernels):
    wide = ["--layout", "64", "64", "--heads", "4", "--kernel-size", "33", "--dtype", "bfloat16"]
    calls = ["--forward", "plain", "--backward", "none", "--rows", rows]
    report = report_of(*wide, "-o", tmp_path / "kernels", *calls, "--arch", "sm_80,sm_90", environment=place)
    for arch, expected in (("sm_80", {"forward.cu"}), ("sm_90", kernels)):
        assert {kernel["kernel"] for kernel in report["kernels"] if kernel["arch"] == arch} == expected


def test_architectures_by_default(place, tmp_path):
    arguments = [*LAYER, "-o", tmp_path / "kernels", "--forward", "plain", "--backward", "none"]
    all_known = report_of(*arguments, environment=place)
    assert {k["arch"] for k in all_known["kernels"]} == {"sm_80", "sm_86", "sm_90"}, "what the stand-in compiles for"
    of_machine = report_of(*arguments, environment=place | {"VICUS_CUDA_DRIVER": FAKE_CUDA})
    assert {k["arch"] for k in of_machine["kernels"]} == {"sm_80", "sm_90"}


def test_a_list_of_problems(place, tmp_path):
    plans = []
    for kernel_size in (5, 7, 5):
        options = ["--layout", 30, 40, "--dtype", "float16", "--kernel-size", kernel_size, "--json"]
        code, out, _ = finish(start("plan", *options, environment=place))
        assert code == 0
        plans.append(out)
    (tmp_path / "a.json").write_text("".join(plans[:2]))
    (tmp_path / "b.json").write_text(plans[2])
    arguments = [tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "kernels", "--arch", "sm_90"]
    report = report_of(*arguments, "--forward", "plain", "--backward", "none", environment=place)
    lines = (1, plans[0].count("\n") + 1)
    assert {k["problem"] for k in report["kernels"]} == {f"{tmp_path}/a.json, line {n}" for n in lines}, "each once"


def test_jobs_change_nothing_but_the_time(place, tmp_path):
    def kernels(jobs):
        folder = tmp_path / f"kernels{jobs}"
        archs = ["--arch", "sm_80,sm_90"]
        report = report_of(*BIASED, *archs, "-o", folder, "--jobs", jobs, environment=place | {"FAKE_NVRTC_SLEEP": 20})
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return [{**kernel, "seconds": 0} for kernel in report["kernels"]], files

    assert kernels(1) == kernels(7)
    refuse(*LAYER, "-o", tmp_path / "none", "--jobs", "0", environment=place, naming=["--jobs", "0"])


def test_jobs_end_with_the_first_failure(place, tmp_path):
    for jobs in (1, 7):
        folder = tmp_path / f"kernels{jobs}"
        folder.mkdir()
        refuse(*BIASED, "-o", folder, "--jobs", jobs, environment=place | {"FAKE_NVRTC_FAIL": 1}, naming=[], code=1)
        assert list(folder.iterdir()) == []


def test_two_processes_at_once(place, tmp_path):
    slow = place | {"FAKE_NVRTC_SLEEP": 20}
    arguments = ["compile", *BIASED, "-o", tmp_path / "kernels", "--arch", "sm_80,sm_90", "--json"]
    both = [start(*arguments, environment=slow) for _ in range(2)]
    done = [finish(process) for process in both]
    assert [(code, err) for code, _, err in done] == [(0, ""), (0, "")]
    reports = [json.loads(out)["kernels"] for _, out, _ in done]
    assert compilations(place) == len(reports[0]) == len(reports[1])
    for a, b in zip(*reports, strict=True):
        assert a["from_cache"] != b["from_cache"]
    assert len(list((tmp_path / "kernels").iterdir())) == len(reports[0])


def test_what_does_not_fit_a_gpu_is_said(place, tmp_path):
    wide = [*LAYER, "--head-dim", "256", "-o", tmp_path / "kernels", "--arch", "sm_86"]
    report = report_of(*wide, environment=place)
    for skipped in report["skipped"]:
        assert skipped["arch"] == "sm_86"
        assert "shared memory" in skipped["reason"]
    code, out, err = finish(start("compile", *wide, environment=place))
    assert (code, err) == (0, "")
    assert out.count("left out: the problem on sm_86") == len(report["skipped"])


def test_wrong_input(place, tmp_path):
    out = ["-o", tmp_path / "kernels"]
    good = [*LAYER, *out, "--arch", "sm_80"]
    (tmp_path / "bad.json").write_text('\n{"layout": 4, "mask": {"kind": "dense", "keys": "four"}}')
    (tmp_path / "long.json").write_text('{"layout": 4, "head_dim": 520, "mask": {"kind": "dense", "keys": 4}}')
    (tmp_path / "file").write_text("")

    def wrong(*arguments, naming, code=2, environment=place):
        refuse(*arguments, environment=environment, naming=naming, code=code)

    wrong(*out, naming=["PROBLEMS", "--layout"])
    wrong(*LAYER, naming=["--output"])
    wrong(*good, tmp_path / "bad.json", naming=["--layout", "PROBLEMS"])
    wrong(tmp_path / "bad.json", *out, naming=["bad.json, line 2: mask.keys", '"four"'])
    wrong(tmp_path / "long.json", *out, naming=["long.json, line 1", "up to 512"])
    wrong(tmp_path / "nobody.json", *out, naming=["nobody.json"], code=1)
    wrong(*LAYER, *out, "--arch", "sm_91", naming=["--arch", "sm_91", "sm_90"])
    wrong(*LAYER, *out, "--arch", "sm_100", naming=["sm_100", "13.1"])
    wrong(*good, "--forward", "all", naming=["--forward"])
    wrong(*good, "--bias-dtype", "int8", naming=["--bias-dtype"])
    wrong(*LAYER, "-o", tmp_path / "file" / "below", "--arch", "sm_80", naming=["below"], code=1)
    wrong(*good, environment=place | {"VICUS_NVRTC": tmp_path / "absent"}, naming=["libnvrtc"])
    assert not (tmp_path / "kernels").exists()

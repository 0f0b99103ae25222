"""The disk cache between processes: at once, killed, on a full or read-only disk, with another compiler."""

import os
import pathlib
import resource
import shutil
import signal
import tempfile
import time

import pytest
from probe import FAKE_NVRTC, KERNEL, fail, finish, start, succeed

NOBODY = 65534


@pytest.fixture
def place(tmp_path):
    """Environment with an empty cache; the compiler writes a line to `compiled` each time it is called."""
    return {
        "VICUS_NVRTC": FAKE_NVRTC,
        "VICUS_CACHE_DIR": tmp_path / "cache",
        "FAKE_NVRTC_LOG": tmp_path / "compiled",
    }


def compilations(place):
    log = pathlib.Path(place["FAKE_NVRTC_LOG"])
    return len(log.read_text().splitlines()) if log.exists() else 0


def entries(place):
    return sorted(path.name for path in pathlib.Path(place["VICUS_CACHE_DIR"]).iterdir())


def compile_kernel(place, text=KERNEL, **options):
    return succeed("compile", 80, text=text, environment=place, **options)


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_second_process_compiles_nothing(place, tmp_path):
    first = succeed("compile", 80, "--out", tmp_path / "first", text=KERNEL, environment=place)
    second = succeed("compile", 80, "--out", tmp_path / "second", text=KERNEL, environment=place)
    assert (first["from_cache"], second["from_cache"]) == ("0", "1")
    assert compilations(place) == 1
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes() != b""
    for name in ("kernel", "registers", "stack", "spill_stores", "spill_loads", "shared", "bytes"):
        assert first[name] == second[name], name
    assert len(entries(place)) == 1


def test_report_is_what_the_log_says(place):
    report = compile_kernel(place)
    assert report["kernel"] == "copy"
    wanted = {"registers": "40", "stack": "24", "spill_stores": "8", "spill_loads": "4", "shared": "100"}
    assert {name: report[name] for name in wanted} == wanted


@pytest.mark.parametrize("change", ["text", "architecture", "specific", "compiler", "header"])
def test_whatever_the_code_depends_on_is_in_the_key(place, change):
    compile_kernel(place)
    include = '#include "vicus/geometry.h"\n'
    if change == "text":
        compile_kernel(place, text=KERNEL + "\n")
    elif change == "architecture":
        succeed("compile", 90, text=KERNEL, environment=place)
    elif change == "specific":
        succeed("compile", 80, "--specific", text=KERNEL, environment=place)
    elif change == "compiler":
        compile_kernel(place | {"FAKE_NVRTC_VERSION": "13.2"})
    else:
        compile_kernel(place, text=include + KERNEL)
    assert compilations(place) == 2
    assert len(entries(place)) == 2


def test_a_compiler_that_has_no_cache_of_its_own(place):
    compile_kernel(place | {"FAKE_NVRTC_VERSION": "12.4"})
    assert compilations(place) == 1


def test_processes_at_once_compile_once(place):
    place["FAKE_NVRTC_SLEEP"] = 500
    processes = [start("compile", 80, text=KERNEL, environment=place) for _ in range(6)]
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [0] * 6
    assert compilations(place) == 1
    assert sorted(result["from_cache"] for _, result in results) == ["0"] + ["1"] * 5
    assert len(entries(place)) == 1


def test_processes_with_different_kernels_do_not_wait_for_each_other(place):
    slow = start("compile", 80, text=KERNEL, environment=place | {"FAKE_NVRTC_SLEEP": 60000})
    wait_for(lambda: compilations(place) == 1)
    compile_kernel(place, text="// another\n" + KERNEL)
    assert slow.poll() is None
    slow.kill()
    slow.communicate()


def test_killed_while_compiling(place):
    """The one that waits for it takes over, and so does a later one."""
    first = start("compile", 80, text=KERNEL, environment=place | {"FAKE_NVRTC_SLEEP": 60000})
    wait_for(lambda: compilations(place) == 1)
    waiting = start("compile", 80, text=KERNEL, environment=place)
    time.sleep(0.2)
    assert waiting.poll() is None
    first.kill()
    assert finish(first)[0] == -signal.SIGKILL
    code, result = finish(waiting)
    assert code == 0
    assert result["from_cache"] == "0"
    assert compile_kernel(place)["from_cache"] == "1"
    assert len(entries(place)) == 1


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))


def test_killed_in_the_middle_of_a_write(place):
    """The kernel stops the process inside write(2), when 64 bytes of the entry are on disk."""
    place_without_log = {name: value for name, value in place.items() if name != "FAKE_NVRTC_LOG"}
    first = start("compile", 80, text=KERNEL, environment=place_without_log, preexec_fn=limit_file_size)
    assert finish(first)[0] == -signal.SIGXFSZ
    (left,) = pathlib.Path(place["VICUS_CACHE_DIR"]).iterdir()
    assert left.name.endswith(".tmp")
    assert left.stat().st_size == 64
    assert compile_kernel(place)["from_cache"] == "0"
    assert compile_kernel(place)["from_cache"] == "1"
    assert len(entries(place)) == 1
    assert not left.exists()


def test_full_disk_costs_a_warning(place):
    def fail_writes():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit_file_size()

    del place["FAKE_NVRTC_LOG"]
    result = compile_kernel(place, preexec_fn=fail_writes, restore_signals=False)
    assert result["from_cache"] == "0"
    (warning,) = result["warning"]
    assert str(place["VICUS_CACHE_DIR"]) in warning
    assert entries(place) == []


@pytest.mark.parametrize("size", [0, 1, 63, 64, 200])
def test_truncated_entry_is_made_again(place, size):
    compile_kernel(place)
    (name,) = entries(place)
    path = pathlib.Path(place["VICUS_CACHE_DIR"]) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    result = compile_kernel(place)
    assert result["from_cache"] == "0"
    assert len(result["warning"]) == 1
    assert path.read_bytes() == whole


def test_read_only_directory_is_read_and_costs_a_warning(place):
    """As a user who may not write there; root may write anywhere, so root becomes nobody."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        shared = pathlib.Path(directory) / "cache"
        place["VICUS_CACHE_DIR"] = shared
        del place["FAKE_NVRTC_LOG"]
        compile_kernel(place)
        for file in shared.iterdir():
            file.chmod(0o444)
        shared.chmod(0o555)
        options = {"user": NOBODY} if os.geteuid() == 0 else {}
        assert compile_kernel(place, **options)["from_cache"] == "1"
        result = compile_kernel(place, text="// another\n" + KERNEL, **options)
        assert result["from_cache"] == "0"
        (warning,) = result["warning"]
        assert str(shared) in warning
        assert "Permission denied" in warning
        shared.chmod(0o755)
        assert len(entries(place)) == 1


def test_default_directories(place, tmp_path):
    del place["VICUS_CACHE_DIR"]
    compile_kernel(place | {"XDG_CACHE_HOME": tmp_path / "xdg", "HOME": tmp_path / "home"})
    assert len(list((tmp_path / "xdg" / "vicus").iterdir())) == 1
    compile_kernel(place | {"XDG_CACHE_HOME": "", "HOME": tmp_path / "home"})
    assert len(list((tmp_path / "home" / ".cache" / "vicus").iterdir())) == 1
    assert compile_kernel(place | {"XDG_CACHE_HOME": "relative", "HOME": tmp_path / "home"})["from_cache"] == "1"
    result = compile_kernel(place | {"XDG_CACHE_HOME": "", "HOME": ""})
    assert result["from_cache"] == "0"
    assert len(result["warning"]) == 1


def test_size_bound(place):
    compile_kernel(place)
    (name,) = entries(place)
    size = (pathlib.Path(place["VICUS_CACHE_DIR"]) / name).stat().st_size
    for i in range(5):
        compile_kernel(place | {"VICUS_CACHE_BYTES": 3 * size + 30}, text=f"//{i}\n" + KERNEL)
        assert len(entries(place)) == min(i + 2, 3)
    assert name not in entries(place)


def test_size_bound_that_is_no_number(place):
    result = compile_kernel(place | {"VICUS_CACHE_BYTES": "1G"})
    (warning,) = result["warning"]
    assert "VICUS_CACHE_BYTES" in warning
    assert len(entries(place)) == 1


def test_bad_source_is_compiled_again_each_time(place):
    for count in (1, 2):
        fail("compile", 80, text="#error no\n", environment=place, naming=["#error directive", "sm_80", "13.1"])
        assert compilations(place) == count
        assert entries(place) == []


@pytest.mark.parametrize("kernels", [0, 2])
def test_a_source_has_one_kernel(place, kernels):
    text = "".join(f"__global__ void k{i}() {{}}\n" for i in range(kernels))
    fail("compile", 80, text=text, environment=place, naming=["exactly one __global__ function"])


def test_prebuilt_kernels_need_no_compiler(place, tmp_path):
    shipped = tmp_path / "shipped"
    for _ in range(2):
        succeed("prebuild", 80, shipped, text=KERNEL, environment=place)
    assert compilations(place) == 1
    elsewhere = {"VICUS_PREBUILT_DIR": shipped, "VICUS_NVRTC": tmp_path / "absent"}
    elsewhere["VICUS_CACHE_DIR"] = tmp_path / "never made"
    result = compile_kernel(elsewhere)
    assert (result["from_cache"], result["kernel"], result["registers"]) == ("1", "copy", "40")
    for arguments, text in (((90,), KERNEL), ((80, "--specific"), KERNEL), ((80,), "//\n" + KERNEL)):
        fail("compile", *arguments, text=text, environment=elsewhere, naming=["libnvrtc"])
    assert not elsewhere["VICUS_CACHE_DIR"].exists()
    other_compiler = place | {"VICUS_PREBUILT_DIR": shipped, "FAKE_NVRTC_VERSION": "13.7"}
    assert compile_kernel(other_compiler)["from_cache"] == "1"
    assert compile_kernel(other_compiler, text="//\n" + KERNEL)["from_cache"] == "0"


def test_prebuilding_says_what_it_cannot_do(place, tmp_path):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "below"
    fail("prebuild", 80, directory, text=KERNEL, environment=place, naming=[str(directory)])
    fail("prebuild", 89, tmp_path, text=KERNEL, environment=place, naming=["sm_89"])
    fail("prebuild", 80, tmp_path, text="#error no", environment=place, naming=["#error directive"])


def test_cache_may_be_removed_at_any_time(place):
    slow = start("compile", 80, text=KERNEL, environment=place | {"FAKE_NVRTC_SLEEP": 500})
    wait_for(lambda: compilations(place) == 1)
    shutil.rmtree(place["VICUS_CACHE_DIR"])
    code, result = finish(slow)
    assert code == 0
    assert len(result["warning"]) == 1
    compile_kernel(place)
    assert len(entries(place)) == 1

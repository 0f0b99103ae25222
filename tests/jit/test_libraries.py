"""Where libnvrtc and libcuda are looked for, and what is said when they are not there."""

import shutil

import pytest
from probe import FAKE_CUDA, FAKE_NVRTC, fail, succeed


@pytest.fixture
def copies(tmp_path):
    """Copies of the compiler in places of their own: name -> file."""

    def copy(name, below="", file="libnvrtc.so.13"):
        target = tmp_path / name / below / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FAKE_NVRTC, target)
        return target

    return {
        "chosen": copy("chosen"),
        "process": copy("process"),
        "packages": copy("packages"),
        "home": copy("home", "lib64"),
        "path": copy("path", "lib", "libnvrtc.so.12"),
    }


def test_order_of_the_search(copies):
    environment = {
        "VICUS_NVRTC": copies["chosen"],
        "CUDA_HOME": copies["home"].parents[1],
        "CUDA_PATH": copies["path"].parents[1],
    }
    preload = ["--preload", copies["process"]]
    directory = ["--directory", copies["packages"].parent / "not there", "--directory", copies["packages"].parent]

    def check(found_in, file, *arguments):
        result = succeed("nvrtc", *arguments, environment=environment)
        assert (result["found_in"], result["path"]) == (found_in, str(file))
        assert result["version"] == "13.1"

    check("VICUS_NVRTC", copies["chosen"], *preload, *directory)
    environment["VICUS_NVRTC"] = copies["chosen"].parent
    check("VICUS_NVRTC", copies["chosen"], *preload, *directory)
    environment["VICUS_NVRTC"] = ""
    check("the process", copies["process"], *preload, *directory)
    check("the Python packages", copies["packages"], *directory)
    check("CUDA_HOME", copies["home"])
    del environment["CUDA_HOME"]
    check("CUDA_PATH", copies["path"])


def test_newest_of_a_directory_is_taken(copies, tmp_path):
    for version in ("11.2", "12"):
        shutil.copy(FAKE_NVRTC, copies["packages"].with_name(f"libnvrtc.so.{version}"))
    result = succeed("nvrtc", "--directory", copies["packages"].parent, environment={})
    assert result["path"] == str(copies["packages"])


def test_a_file_that_is_no_library_is_passed_over(copies):
    copies["home"].write_text("no library")
    environment = {"CUDA_HOME": copies["home"].parents[1], "CUDA_PATH": copies["path"].parents[1]}
    assert succeed("nvrtc", environment=environment)["found_in"] == "CUDA_PATH"


def test_chosen_compiler_that_is_not_there(tmp_path):
    for chosen in (tmp_path / "nowhere.so", tmp_path):
        fail("nvrtc", environment={"VICUS_NVRTC": chosen}, naming=["libnvrtc", "VICUS_NVRTC", str(chosen)])
        fail("compile", 80, text="", environment={"VICUS_NVRTC": chosen}, naming=["libnvrtc", str(chosen)])


def test_chosen_compiler_that_is_something_else():
    fail("nvrtc", environment={"VICUS_NVRTC": FAKE_CUDA}, naming=["VICUS_NVRTC", "not libnvrtc 11.2 or later"])


def test_old_compiler_serves_newer_chips_of_the_same_kind(tmp_path):
    """The stand-in knows 80, 86 and 90."""
    text = "__global__ void k() {}\n"
    environment = {"VICUS_NVRTC": FAKE_NVRTC, "VICUS_CACHE_DIR": tmp_path}
    for asked, compiled in ((80, 80), (86, 86), (89, 86), (90, 90)):
        out = tmp_path / "cubin"
        succeed("compile", asked, "--out", out, text=text, environment=environment)
        assert f"--gpu-architecture=sm_{compiled} ".encode() in out.read_bytes()
    succeed("compile", 90, "--specific", "--out", out, text=text, environment=environment)
    assert b"--gpu-architecture=sm_90a " in out.read_bytes()
    for asked in (75, 100, 120):
        naming = [f"sm_{asked}", "13.1", "80, 86, 90", str(FAKE_NVRTC)]
        fail("compile", asked, text=text, environment=environment, naming=naming)
    fail("compile", 89, "--specific", text=text, environment=environment, naming=["sm_89"])


def test_driver_starts():
    result = succeed("driver", environment={"VICUS_CUDA_DRIVER": FAKE_CUDA})
    assert result["path"] == str(FAKE_CUDA)
    assert (result["version"], result["devices"]) == ("13010", "2")


def test_driver_that_is_not_there(tmp_path):
    missing = tmp_path / "libcuda.so.1"
    fail("driver", environment={"VICUS_CUDA_DRIVER": missing}, naming=["no CUDA driver", str(missing)])


def test_driver_that_is_too_old():
    fail("driver", environment={"VICUS_CUDA_DRIVER": FAKE_NVRTC}, naming=[str(FAKE_NVRTC), "cuInit", "11.2 or later"])


def test_driver_without_a_device():
    environment = {"VICUS_CUDA_DRIVER": FAKE_CUDA, "FAKE_CUDA_FAILS": "cuInit 100"}
    fail("driver", environment=environment, naming=[str(FAKE_CUDA), "no device"])


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount"])
def test_driver_that_does_not_start(call):
    environment = {"VICUS_CUDA_DRIVER": FAKE_CUDA, "FAKE_CUDA_FAILS": f"{call} 803"}
    fail("driver", environment=environment, naming=[f"{call} failed", "803", "what the driver says"])


def test_driver_may_be_started_in_a_child_when_the_parent_did_not():
    result = succeed("fork-first", environment={"VICUS_CUDA_DRIVER": FAKE_CUDA})
    assert result["devices"] == "2"

"""The extension and the wheel: what they need, what they show, what importing them brings along."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import vicus
from vicus import _library

ROOT = Path(__file__).parents[2]
NEW_IMPORTS = """
import sys, torch
before = set(sys.modules)
import vicus
print(*sorted(set(sys.modules) - before))
"""
OPENMP = """
import torch
def runtimes():
    return {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]}
x = torch.randn(4, 64, 64, 8, 64)
torch.set_num_threads(2)
torch.nn.functional.scaled_dot_product_attention(x[:, 0], x[:, 0], x[:, 0])
before = runtimes()
import vicus
vicus.na2d(x, x, x, 7)
print(len(before), len(runtimes()))
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tool(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def extension():
    return str(_library.library_path())


def test_extension_uses_the_stable_interface_of_torch_alone(extension):
    undefined = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", extension).splitlines()]
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    of_others = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC|HWY)_")
    rest = {name for name in undefined if not of_others.search(name)} - weak
    # Weak references into the C++ library carry no version.
    rest = {name for name in rest if not re.match(r"_Z(N[KRO]*|T[VIST])?St", name)}
    assert rest, "no symbol of torch at all"
    assert {name for name in rest if not re.match(r"(aoti_)?torch_\w+$", name)} == set()


def test_extension_exports_nothing_and_needs_no_second_runtime(extension):
    assert tool("nm", "-D", "--defined-only", extension) == ""
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "-d", extension))
    assert "libtorch_cpu.so" in needed
    forbidden = re.compile(r"omp|python|libc10|libtorch\.so|libtorch_python|libvicus|cuda")
    assert [name for name in needed if forbidden.search(name)] == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_second_openmp_runtime_in_the_process():
    before, after = run(OPENMP).split()
    assert before == after


def test_import_is_lean():
    imported = run(NEW_IMPORTS).split()
    assert "vicus" in imported
    heavy = re.compile(
        r"torch\._(dynamo|inductor)|flex_attention|numpy|vicus\.(flex|composite|natten|backends|legacy|nn)"
    )
    assert [name for name in imported if heavy.search(name)] == []


def test_info():
    about = vicus.info()
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert about["torch"] == torch.__version__
    assert Path(about["library"]).is_file()
    assert set(about["engines"]) <= {"cpu", "reference"} and about["engines"][-1] == "reference"
    assert set(about["cpu_targets"]) <= set(about["cpu_targets_built"])
    assert about["threads"] == torch.get_num_threads()


def test_missing_extension_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VICUS_LIBRARY", str(tmp_path / "_C.so"))
    with pytest.raises(ImportError, match=re.escape(str(tmp_path / "_C.so"))):
        _library.load()


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ImportError, match=r"torch is 2\.9\.1\+cu128; vicus needs 2\.10"):
        _library.load()


def test_public_names_exist_and_are_documented():
    for name in vicus.__all__:
        thing = getattr(vicus, name)
        assert thing.__doc__, name
    assert len(set(vicus.__all__)) == len(vicus.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    # A build folder that stays makes the next run quick.
    options = ("--no-build-isolation", "--no-deps", f"-Cbuild-dir={ROOT / 'build' / 'wheel'}", "-w", str(folder))
    subprocess.run([*pip, "wheel", *options, str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_serves_every_python(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"vicus-{vicus.info()['version']}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        about = email.message_from_bytes(file.read(next(n for n in names if n.endswith("METADATA"))))
    assert about["Requires-Python"] == ">=3.10"
    assert about.get_all("Requires-Dist") == ["torch>=2.10", 'PyYAML>=6; extra == "yaml"']
    sources = {f"vicus/{path.relative_to(ROOT / 'python/vicus')}" for path in (ROOT / "python/vicus").rglob("*.py")}
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    extra = inside - sources
    assert sources <= inside
    assert "vicus/_C.so" in extra
    beside = r"vicus/(_C\.so|py\.typed|nn/preference\.json|libhwy\.so\.\d+)"
    assert {name for name in extra if not re.fullmatch(beside, name)} == set()
    assert "vicus/nn/preference.json" in extra
    assert any("highway" in name for name in names)


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = """
import torch, vicus
x = torch.randn(1, 6, 6, 2, 8, requires_grad=True)
vicus.na2d(x, x, x, 3).sum().backward()
libraries = {line.split()[-1] for line in open('/proc/self/maps') if 'hwy' in line}
print(vicus.info()['library'], *libraries, sep='\\n')
"""
    library, *highway = run(code, PYTHONPATH=str(tmp_path), VICUS_LIBRARY="").splitlines()
    assert library == str(tmp_path / "vicus" / "_C.so")
    assert all(Path(path).parent == tmp_path / "vicus" for path in highway)

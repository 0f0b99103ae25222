"""What a user of the installed library meets: headers, find_package, pkg-config, a program of a few lines."""

import math
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("VICUS_BUILD", ROOT / "build"))
EXAMPLE = ROOT / "examples" / "cpp"
WARNINGS = ["-std=c++20", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Werror"]
STANDARD = {
    "algorithm",
    "array",
    "bit",
    "cmath",
    "compare",
    "concepts",
    "cstddef",
    "cstdint",
    "functional",
    "initializer_list",
    "limits",
    "memory",
    "optional",
    "ostream",
    "span",
    "stdexcept",
    "string",
    "string_view",
    "tuple",
    "type_traits",
    "utility",
    "variant",
    "vector",
}


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def configure(source: Path, build: Path, *options: str) -> None:
    run("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)


@pytest.fixture(scope="session")
def shared_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of this build, installed."""
    prefix = tmp_path_factory.mktemp("shared") / "prefix"
    run("cmake", "--install", BUILD, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def static_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static library, built and installed; one vector target, since this is not about speed."""
    folder = tmp_path_factory.mktemp("static")
    options = ("-DBUILD_SHARED_LIBS=OFF", "-DVICUS_BUILD_CLI=OFF", "-DVICUS_CPU_TARGETS=AVX2")
    configure(ROOT, folder / "build", "-G", "Ninja", *options)
    run("cmake", "--build", folder / "build", "--parallel", "2")
    run("cmake", "--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(params=["shared", "static"])
def prefix(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_prefix")


def check_example(output: str) -> None:
    """Each row of the printed image: the same mean weighted by likeness, from the definition."""
    size = 8
    image = [[(0.0 if x < 4 else 1.0) + 0.05 * math.sin(7 * (y * size + x)) for x in range(size)] for y in range(size)]
    rows = [[float(word) for word in line.split()] for line in output.splitlines()]
    assert [len(row) for row in rows] == [size] * size
    for y in range(size):
        for x in range(size):
            top, left = (min(max(i - 1, 0), size - 3) for i in (y, x))
            near = [image[i][j] for i in range(top, top + 3) for j in range(left, left + 3)]
            weights = [math.exp(-50 * (image[y][x] - pixel) ** 2) for pixel in near]
            want = sum(w * pixel for w, pixel in zip(weights, near, strict=True)) / sum(weights)
            assert abs(rows[y][x] - want) < 2e-4, (y, x)


def test_example_builds_with_find_package(prefix: Path, tmp_path: Path) -> None:
    configure(EXAMPLE, tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path)
    check_example(run(tmp_path / "example"))
    cache = (tmp_path / "CMakeCache.txt").read_text()
    found = re.search(r"^vicus_DIR:\w+=(.*)$", cache, re.M)
    assert found and Path(found[1]).is_relative_to(prefix)


def test_example_builds_with_pkg_config(prefix: Path, tmp_path: Path) -> None:
    (pc,) = prefix.rglob("vicus.pc")
    env = {"PKG_CONFIG_PATH": str(pc.parent)}
    flags = run("pkg-config", "--cflags", "--libs", "vicus", env=env).split()
    program = tmp_path / "example"
    run("g++", *WARNINGS, EXAMPLE / "main.cc", "-o", program, *flags, f"-Wl,-rpath,{pc.parent.parent}")
    check_example(run(program))
    version = re.search(r"project\(vicus VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert version and run("pkg-config", "--modversion", "vicus", env=env).strip() == version[1]


def test_example_builds_inside_a_larger_project(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        "project(outer LANGUAGES CXX)\n"
        "set(VICUS_CPU_TARGETS AVX2)\n"
        f'add_subdirectory("{ROOT}" vicus)\n'
        f'add_executable(example "{EXAMPLE}/main.cc")\n'
        "target_link_libraries(example PRIVATE vicus::vicus)\n"
    )
    configure(tmp_path, tmp_path / "build", "-G", "Ninja")
    run("cmake", "--build", tmp_path / "build", "--parallel", "2")
    check_example(run(tmp_path / "build" / "example"))


def test_command_line_runs_from_its_prefix(shared_prefix: Path) -> None:
    assert "vicus" in run(shared_prefix / "bin" / "vicus", "--help", env={"LD_LIBRARY_PATH": ""})


def headers() -> list[str]:
    return sorted(path.name for path in (ROOT / "include" / "vicus").iterdir())


def test_every_header_is_installed(prefix: Path) -> None:
    assert sorted(path.name for path in (prefix / "include" / "vicus").iterdir()) == headers()


@pytest.mark.parametrize("header", headers())
def test_header_needs_only_the_standard_library(header: str) -> None:
    text = (ROOT / "include" / "vicus" / header).read_text()
    for name in re.findall(r"^\s*#\s*include\s*[<\"](.*?)[>\"]", text, re.M):
        assert name in STANDARD or name.removeprefix("vicus/") in headers(), name


@pytest.mark.parametrize("header", headers())
def test_header_compiles_alone(header: str, shared_prefix: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cc"
    source.write_text(f"#include <vicus/{header}>\n#include <vicus/{header}>\nint main() {{}}\n")
    run("g++", *WARNINGS, "-fsyntax-only", f"-I{shared_prefix}/include", source)


def test_nothing_in_the_prefix_names_the_checkout(shared_prefix: Path) -> None:
    for path in shared_prefix.rglob("*"):
        if path.is_file() and path.suffix in {".cmake", ".pc", ".h", ".hpp"}:
            assert str(ROOT) not in path.read_text(), path

import importlib.util
import pathlib
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
# probe.py; oracle.py; what is measured on GPUs
sys.path[:0] = [str(folder) for folder in (TESTS / "jit", TESTS / "python", TESTS.parent / "bench")]


def pytest_addoption(parser):
    parser.addoption("--gpu-cases", type=int, default=250, help="random problems that are compiled and run on the GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: wants the GPU, or most of its memory, for itself")


@pytest.fixture(scope="session")
def nvrtc_directory():
    """Where the Python package of NVRTC has its library."""
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None, "the Python package nvidia-cuda-nvrtc is not installed"
    found = [p.parent for root in spec.submodule_search_locations for p in pathlib.Path(root).glob("**/libnvrtc.so.*")]
    assert found, "the Python package nvidia-cuda-nvrtc is not installed"
    return found[0]

import importlib.util
import os
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
    config.addinivalue_line("markers", "random_cases(most): argument `seed`, at most --gpu-cases of them")


def pytest_generate_tests(metafunc):
    """Seeds from VICUS_SEED on; one where there is no GPU, and the test is skipped."""
    for mark in metafunc.definition.iter_markers("random_cases"):
        import gpu_support  # needs PyTorch, as tests with this mark do

        count = min([metafunc.config.getoption("--gpu-cases", default=250), *mark.args])
        first = int(os.environ.get("VICUS_SEED", "0"))
        metafunc.parametrize("seed", range(first, first + (count if gpu_support.PRESENT else 1)))


@pytest.fixture(autouse=True)
def memory_for_others():
    """What oracles took of the GPU's memory is given back: many processes share it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 29:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def nvrtc_directory():
    """Where the Python package of NVRTC has its library."""
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None, "the Python package nvidia-cuda-nvrtc is not installed"
    found = [p.parent for root in spec.submodule_search_locations for p in pathlib.Path(root).glob("**/libnvrtc.so.*")]
    assert found, "the Python package nvidia-cuda-nvrtc is not installed"
    return found[0]

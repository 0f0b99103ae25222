import pathlib
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
# gpu_problems.py and other parts of the GPU tests; oracle.py, bridge.py
sys.path[:0] = [str(folder) for folder in (TESTS / "gpu", TESTS / "python", TESTS / "emulation")]


@pytest.fixture(scope="session")
def elsewhere():
    """Where tests call what needs the stand-in driver, which must not be found by other tests of this process."""
    from processes import Elsewhere  # by the path above

    process = Elsewhere()
    yield process
    process.close()


@pytest.fixture(scope="session")
def on_two_multiprocessors():
    """The same, of GPUs so small that a small problem has blocks enough for several on each multiprocessor."""
    from processes import Elsewhere

    process = Elsewhere(FAKE_CUDA_MULTIPROCESSORS="2")
    yield process
    process.close()

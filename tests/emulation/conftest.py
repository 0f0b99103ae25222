import concurrent.futures
import multiprocessing
import pathlib
import signal
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
# gpu_problems.py and other parts of the GPU tests; oracle.py, bridge.py
sys.path[:0] = [str(folder) for folder in (TESTS / "gpu", TESTS / "python", TESTS / "emulation")]
LONGEST_TASK = 600  # seconds: nothing else ends a kernel that runs for ever


def alarmed(function, arguments, options):
    signal.alarm(LONGEST_TASK)
    try:
        return function(*arguments, **options)
    finally:
        signal.alarm(0)


class Elsewhere:
    """Calls functions in a process of their own, and in another one when that died."""

    def __init__(self):
        self.pool = None

    def __call__(self, function, *arguments, **options):
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        try:
            return self.pool.submit(alarmed, function, arguments, options).result()
        except concurrent.futures.process.BrokenProcessPool:
            self.pool = None
            raise

    def close(self):
        if self.pool is not None:
            self.pool.shutdown()


@pytest.fixture(scope="session")
def elsewhere():
    """Where tests call what needs the stand-in driver, which must not be found by other tests of this process."""
    process = Elsewhere()
    yield process
    process.close()

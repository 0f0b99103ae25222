"""Another process for what this one must not do: libraries that are found once stay found."""

import concurrent.futures
import multiprocessing
import signal

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

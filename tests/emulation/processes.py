"""Another process for what this one must not do: libraries that are found once stay found."""

import concurrent.futures
import multiprocessing
import os
import signal

LONGEST_TASK = 600  # seconds: nothing else ends a kernel that runs for ever


def begin(environment):
    os.environ.update(environment)


def alarmed(function, arguments, options):
    signal.alarm(LONGEST_TASK)
    try:
        return function(*arguments, **options)
    finally:
        signal.alarm(0)


class Elsewhere:
    """Calls functions in a process of their own, and in another one when that died. `environment`: more of it there."""

    def __init__(self, **environment):
        self.pool = None
        self.environment = environment

    def __call__(self, function, *arguments, **options):
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = concurrent.futures.ProcessPoolExecutor(1, context, begin, (self.environment,))
        try:
            return self.pool.submit(alarmed, function, arguments, options).result()
        except concurrent.futures.process.BrokenProcessPool:
            self.pool = None
            raise

    def close(self):
        if self.pool is not None:
            self.pool.shutdown()

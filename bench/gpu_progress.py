"""A plugin of pytest: results go to the file $VICUS_TEST_PROGRESS at once: a run that is cut still tells."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message)
    return str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")


def _note(report: Any, seconds: float) -> None:
    path = os.environ.get("VICUS_TEST_PROGRESS")
    if not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds}
    if report.outcome != "passed":
        line["message"] = _message(report)[:1000]
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    """Writes a line for the call of a test, and for a setup or teardown that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        _note(report, report.duration)


def pytest_collectreport(report: Any) -> None:
    """A file whose tests cannot be collected has failed as a whole."""
    if report.outcome == "failed":
        _note(report, 0.0)

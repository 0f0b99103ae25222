"""How many random cases a run makes and how they repeat: as in tests/python/conftest.py."""

import os

import hypothesis
import pytest
import torch

import vicus

COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("fixed", derandomize=True, **COMMON)
hypothesis.settings.register_profile("random", derandomize=False, **COMMON)
hypothesis.settings.load_profile(os.environ.get("VICUS_PROFILE", "fixed"))


def pytest_addoption(parser):
    parser.addoption(
        "--device", help='where tests make their tensors, "cuda" for example: for those that name no device'
    )


@pytest.fixture(autouse=True)
def default_device(pytestconfig):
    if name := pytestconfig.getoption("--device", default=None):
        with torch.device(name):
            yield
    else:
        yield


def pytest_report_header():
    about = vicus.info()
    return f"vicus {about['version']}, torch {torch.__version__}, CPU targets {', '.join(about['cpu_targets'])}"

"""Random cases as in tests/python/conftest.py, and an environment that says nothing about backends."""

import os

import hypothesis
import pytest

from vicus.nn import choice

COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("fixed", derandomize=True, **COMMON)
hypothesis.settings.register_profile("random", derandomize=False, **COMMON)
hypothesis.settings.load_profile(os.environ.get("VICUS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    words = ("FLASH_ATTN", "FUSED_ATTN", "UNFUSED_ATTN", "ATTN_PREFERENCE", "ALLOW_NONDETERMINISTIC_ALGO", "DEBUG")
    for prefix in ("NVTE_", "VICUS_"):
        for word in (*words, "DEBUG_LEVEL"):
            monkeypatch.delenv(prefix + word, raising=False)
    choice._decide.cache_clear()  # tests change the table, and what backends say
    yield
    choice._decide.cache_clear()

"""How many random cases a run makes and how they repeat.

VICUS_PROFILE=fixed (the default) draws the same cases every time; VICUS_PROFILE=random draws new ones and prints how to
repeat a failure. VICUS_EXAMPLES scales the number of cases: 0.1 for a quick look, 10 for a night.
"""

import os

import bridge
import hypothesis

COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("fixed", derandomize=True, **COMMON)
hypothesis.settings.register_profile("random", derandomize=False, **COMMON)
hypothesis.settings.load_profile(os.environ.get("VICUS_PROFILE", "fixed"))


def pytest_report_header():
    try:
        about = bridge.info()
    except RuntimeError as error:
        return f"vicus: {error}"
    return f"vicus {about['version']}, CPU targets {about['targets']}, sanitizer {about['sanitizer'] or 'none'}"

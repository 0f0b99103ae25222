import importlib.util
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "jit"))  # probe.py


@pytest.fixture(scope="session")
def nvrtc_directory():
    """Where the Python package of NVRTC has its library."""
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None, "the Python package nvidia-cuda-nvrtc is not installed"
    found = [p.parent for root in spec.submodule_search_locations for p in pathlib.Path(root).glob("**/libnvrtc.so.*")]
    assert found, "the Python package nvidia-cuda-nvrtc is not installed"
    return found[0]

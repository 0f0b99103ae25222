"""examples/ do what they say, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments):
    """Output of an example; a failure shows what it wrote."""
    done = subprocess.run([sys.executable, EXAMPLES / arguments[0], *arguments[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_digits_learns_to_read(tmp_path):
    out, err = run("digits.py", "--epochs", "5", "--device", "cpu", "--plot", str(tmp_path / "curves.png"))
    accuracy = float(re.search(r"test accuracy ([\d.]+)% after 5 epochs", out)[1])
    assert accuracy > 90  # of ten digits; 97 and more with all epochs
    assert "step/s" in err  # the progress bar
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_digits_repeats_with_its_seed():
    accuracies = [run("digits.py", "--epochs", "1", "--device", "cpu", "--quiet", "--seed", s)[0] for s in "112"]
    first, second, other = (text.split("%")[0] for text in accuracies)
    assert first == second
    assert first != other


@pytest.mark.parametrize("arguments", [("--epochs", "0"), ("--batch", "many"), ("--nonsense",)])
def test_digits_names_a_wrong_argument(arguments):
    done = subprocess.run([sys.executable, EXAMPLES / "digits.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_digits_explains_itself():
    out, _ = run("digits.py", "--help")
    for option in ("--epochs", "--seed", "--plot", "--device"):
        assert option in out

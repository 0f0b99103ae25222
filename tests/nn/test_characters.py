"""examples/characters.py does what it says, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "characters.py"
SMALL = ("--width", "64", "--layers", "2", "--context", "64", "--device", "cpu")


def run(*arguments):
    done = subprocess.run([sys.executable, EXAMPLE, *SMALL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def loss(text, steps):
    return float(re.search(rf"test loss ([\d.]+) bits per character after {steps} steps", text)[1])


@pytest.mark.parametrize("groups", ["1", "8"])
def test_learns(groups, tmp_path):
    out, err = run("--steps", "60", "--groups", groups, "--plot", str(tmp_path / "curve.png"), "--write", "20")
    assert 1 < loss(out, 60) < 4.2  # bits; 4.6 is what the frequencies of the characters give
    assert len(out.split("\n", 1)[1].removesuffix(f"curve in {tmp_path / 'curve.png'}\n")) == 21
    assert "step/s" in err  # the progress bar
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000


def test_repeats_with_its_seed():
    losses = [run("--steps", "3", "--quiet", "--write", "0", "--seed", seed)[0].split("after")[0] for seed in "112"]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "0"), "--steps"),
        (("--groups", "3"), "num_query_groups is 3; allowed: a divisor of num_attention_heads, 8: 1, 2, 4, 8"),
        (("--heads", "7"), "num_query_groups is 2; allowed: a divisor of num_attention_heads, 7: 1, 7"),
    ],
)
def test_names_a_wrong_argument(arguments, said):
    done = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr

"""Keys and values of grouped heads are never repeated: the peak of resident memory of a model with 32 heads."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

HEADS, DIM, QUERIES, KEYS = 32, 64, 32, 8192
MIB = 1 << 20
KEY_AND_VALUE = 2 * KEYS * HEADS * DIM * 4  # bytes, with a group for every head

SCRIPT = f"""
import re, sys, torch
from vicus.nn import CrossAttention, TransformerConfig, attention_backends

def peak():  # of this process alone; getrusage would begin with that of its parent
    return int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

backend, groups = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = TransformerConfig(32, {HEADS}, groups, kv_channels={DIM}, attention_dropout=0.0, attention_backend=backend)
model = CrossAttention(config)

def train(queries, keys):
    x, y = torch.randn(queries, 1, 32), torch.randn(keys, 1, 32)
    output, bias = model(x, key_value_states=y)
    output.sum().backward()

train(2, 16)  # libraries, threads
before = peak()
train({QUERIES}, {KEYS})
print(peak() - before)
"""


def growth(backend, groups):
    """Bytes by which a forward and a backward pass raise the peak of a fresh process."""
    command = (sys.executable, "-c", SCRIPT, backend, str(groups))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("backend", ["flash", "unfused"])
def test_peak_falls_with_the_groups(backend):
    grown = {groups: growth(backend, groups) for groups in (32, 8, 1)}
    # At the peak, keys, values and their gradients are there: twice the bytes of both for 32 groups. Repeated for every
    # head, fewer groups would save nothing.
    assert grown[32] >= 1.9 * KEY_AND_VALUE
    assert grown[32] - grown[8] >= 0.9 * 2 * KEY_AND_VALUE * 24 / 32
    assert grown[32] - grown[1] >= 0.9 * 2 * KEY_AND_VALUE * 31 / 32
    # What is left with one group: queries and outputs, and in the unfused backend the scores.
    scores = HEADS * QUERIES * KEYS * 4 if backend == "unfused" else 0
    assert grown[1] <= 5 * scores + KEY_AND_VALUE / 2 + 16 * MIB

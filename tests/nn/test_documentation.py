"""The code in the documentation of the layers runs as it stands; what is public says what it is."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vicus.nn
from vicus.nn import DotProductAttention

PAGE = (Path(__file__).parents[2] / "docs" / "attention-layer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, capsys):
    exec(compile(BLOCKS[number], f"block {number} of attention-layer.md", "exec"), {})


def test_the_table_of_an_explanation_looks_as_it_is_shown():
    q, k, v = (torch.randn(6, 2, n, 8) for n in (4, 2, 2))
    shown = re.search(r"```\n(cpu, float32.*?)```", PAGE, re.DOTALL)[1].splitlines()
    said = str(DotProductAttention(4, 8, 2).explain(q, k, v)).splitlines()
    assert said[0] == shown[0]
    assert [line.split()[:2] for line in said] == [line.split()[:2] for line in shown]
    assert said[3] == shown[3]


def test_public_names_are_documented():
    assert len(set(vicus.nn.__all__)) == len(vicus.nn.__all__)
    for name in vicus.nn.__all__:
        thing = getattr(vicus.nn, name)
        assert inspect.getdoc(thing), name
        for part in vars(thing) if isinstance(thing, type) else ():
            if not part.startswith("_") and callable(getattr(thing, part)):
                assert inspect.getdoc(getattr(thing, part)), f"{name}.{part}"


def test_layers_come_when_they_are_asked_for():
    code = "import sys, vicus; assert 'vicus.nn' not in sys.modules; print(vicus.nn.SelfAttention.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "SelfAttention\n"
    with pytest.raises(AttributeError, match="module 'vicus' has no attribute 'nm'"):
        _ = vicus.nm

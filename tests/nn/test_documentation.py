"""The code in the documentation of the layers runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

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

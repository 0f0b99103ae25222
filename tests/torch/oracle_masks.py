"""Masks as tables, from the oracle of tests/python."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from oracle import axis_keys, band_keys

__all__ = ["axis_keys", "band_keys", "table"]


def table(rows, keys):
    """Bool [queries, keys] of lists of seen keys."""
    seen = torch.zeros(len(rows), keys, dtype=torch.bool)
    for row, columns in zip(seen, rows, strict=True):
        row[columns] = True
    return seen

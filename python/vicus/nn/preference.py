"""Which backend is preferred among those that take a problem: by measured figures, or by Transformer Engine's rule.

The figures are in `preference.json`, which says how and where each was measured; bench/attention_backends.py measures
on the machine that it runs on and puts its rows into the table.
"""

import functools
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from vicus.nn.problem import Problem

__all__ = ["architecture_of", "rank", "table"]

# Where the table has no row of a kind of mask, the first of these that it has stands for it.
_LIKE = {
    "full": ("full", "causal"),
    "causal": ("causal", "full"),
    "window": ("window", "causal", "full"),
    "neighborhood": ("neighborhood", "window"),
}
_ORDER = ("flash", "fused", "unfused")


@functools.cache
def table() -> dict[str, Any]:
    """The table as it is checked in: "how", "sources" and "rows"."""
    return json.loads(resources.files(__package__).joinpath("preference.json").read_text(encoding="utf-8"))


def architecture_of(device: str, architecture: tuple[int, int] | None) -> str:
    """What the table calls a device: "cpu", or "sm90" and the like."""
    return device if architecture is None else f"sm{architecture[0]}{architecture[1]}"


def _row(problem: Problem) -> dict[str, Any] | None:
    """The row nearest to a problem: of its architecture and pass, of its mask or one like it, nearest in head dim and
    length."""
    name = architecture_of(problem.device, problem.architecture)
    wanted = "training" if problem.differentiable else "forward"
    rows = [row for row in table()["rows"] if row["architecture"] == name and row["pass"] == wanted]
    for mask in _LIKE[problem.kind]:
        alike = [row for row in rows if row["mask"] == mask]
        if alike:
            return min(alike, key=functools.partial(_distance, problem))
    return None


def _distance(problem: Problem, row: dict[str, Any]) -> float:
    tokens = math.sqrt(max(problem.max_seqlen_q, 1) * max(problem.max_seqlen_kv, 1))
    dims = max(problem.head_dim_qk, 1)
    return abs(math.log2(tokens / row["tokens"])) + abs(math.log2(dims / row["head_dim"]))


def rank(problem: Problem, names: Sequence[str], te: bool) -> list[tuple[str, str]]:
    """Orders backends.

    Args:
        problem: What is asked.
        names: Backends that take it.
        te: Whether Transformer Engine's rule decides, and not what was measured.

    Returns:
        Names, the preferred one first, each with why it stands there.
    """
    row = None if te else _row(problem)
    if row is None:
        hopper = problem.architecture is not None and problem.architecture >= (9, 0)
        order = ("fused", "flash", "unfused") if hopper else _ORDER
        rule = "fused first on Hopper and newer" if hopper else "flash first before Hopper"
        because = "VICUS_ATTN_PREFERENCE=te" if te else "nothing was measured on this architecture"
        return [(name, f"{rule}, {because}") for name in sorted(names, key=order.index)]
    figures = row["tflops"]
    where = f"{row['mask']}, head dim {row['head_dim']}, {row['tokens']} tokens, {row['pass']}, {row['source']}"

    def key(name: str) -> tuple[float, int]:
        return -figures.get(name, 0), _ORDER.index(name)

    def why(name: str) -> str:
        return f"{figures[name]:g} TFLOP/s ({where})" if name in figures else f"not measured ({where})"

    return [(name, why(name)) for name in sorted(names, key=key)]

"""Random problems. What is random comes from a chooser, so that hypothesis (which shrinks failures) and stress.py
(which runs for hours) draw from the same problems."""

import dataclasses

import hypothesis.strategies as st
import memory
import numpy as np
from oracle import Dense, Neighborhood, Problem

HEAD_DIMS = (1, 3, 4, 7, 8, 16, 17, 32, 40, 64, 65, 100, 128, 130)
KINDS = ("1d", "2d", "3d", "dense", "lengths", "packed", "bias")
ROWS = (0, 16, 32, 64)


class RandomChooser:
    """Draws from one numpy generator."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def integer(self, least, most):
        return int(self._rng.integers(least, most + 1))

    def pick(self, options):
        return options[self.integer(0, len(options) - 1)]


class HypothesisChooser:
    def __init__(self, draw):
        self._draw = draw

    def integer(self, least, most):
        return self._draw(st.integers(least, most))

    def pick(self, options):
        return self._draw(st.sampled_from(options))


def one_in(choose, n):
    """True once in n draws, and never in a shrunk case that does not need it."""
    return choose.integer(0, n - 1) == n - 1


@dataclasses.dataclass
class Case:
    problem: Problem
    options: dict
    style: str  # of the arrays in memory
    spread: float  # of query and key
    seed: int  # of the data


def axis(choose, longest):
    n = choose.integer(1, longest)
    window = choose.pick([choose.integer(1, n), choose.integer(1, min(n, 9)), n, n + choose.integer(1, 4)])
    step = choose.integer(1, window) if one_in(choose, 2) else 1
    dilation = choose.integer(1, n + 1) if one_in(choose, 3) else 1
    return n, window, step, dilation, int(one_in(choose, 3))


def heads(choose):
    heads_kv = choose.integer(1, 3)
    return heads_kv * choose.pick([1, 1, 2, 3, 4, 5]), heads_kv


def cumulative(choose, sequences, longest):
    """Lengths that are often zero, summed."""
    total = [0]
    for _ in range(sequences):
        total.append(total[-1] + choose.pick([0, choose.integer(0, 5), choose.integer(1, longest)]))
    return total


def dense_mask(choose, kind, batch):
    queries, keys = choose.integer(1, 150), choose.pick([choose.integer(0, 8), choose.integer(1, 300)])
    mask = Dense(keys, choose.pick(["none", "top_left", "bottom_right"]))
    if one_in(choose, 3):
        mask.window_left = choose.integer(-1, 40)
        mask.window_right = choose.integer(-1, 40) if mask.causal == "none" else choose.integer(-1, 0)
    if kind == "lengths":
        mask.key_lengths = [choose.integer(0, keys) for _ in range(batch)]
    if kind == "packed":
        sequences = choose.integer(1, 5)
        mask.cumulative_queries = cumulative(choose, sequences, 70)
        mask.cumulative_keys = cumulative(choose, sequences, 90)
        queries, mask.keys = mask.cumulative_queries[-1], mask.cumulative_keys[-1]
        if queries == 0:
            queries = mask.cumulative_queries[-1] = 1
    return queries, mask


def query_tile(choose, rank, rows):
    """Any box of at most `rows` positions; unused leading axes are one long."""
    extent, left = [1, 1, 1], rows or 64
    for a in range(3 - rank, 3):
        extent[a] = choose.integer(1, left)
        left //= extent[a]
    return extent


def problem(choose, kind, dtype):
    h, h_kv = heads(choose)
    dim = choose.pick(HEAD_DIMS)
    dim_v = choose.pick(HEAD_DIMS) if one_in(choose, 3) else dim
    batch = 1 if kind == "packed" else choose.pick([1, 1, 2, 3])
    if kind in ("1d", "2d", "3d"):
        rank = int(kind[0])
        axes = [axis(choose, {1: 250, 2: 18, 3: 8}[rank]) for _ in range(rank)]
        layout, window, step, dilation, causal = [list(x) for x in zip(*axes, strict=True)]
        mask = Neighborhood(window, step, dilation, causal)
    else:
        queries, mask = dense_mask(choose, kind, batch)
        layout = [queries]
    made = Problem(layout, h, h_kv, dim, dim_v, mask, dtype, batch)
    made.scale = choose.pick([None, None, 0.3, -0.7, 0.0])
    made.additional_tokens = choose.pick([0, 0, 1, choose.integer(1, 40)])
    made.rpb = not made.dense and one_in(choose, 3)
    made.attn_bias = kind == "bias"
    # Scores of the whole problem bound what the oracle takes.
    while made.batch > 1 and made.batch * made.queries * made.heads > 4000:
        made.batch -= 1
        if made.dense and made.mask.key_lengths:
            made.mask.key_lengths.pop()
    return made


def case(choose, kind, dtype, engine="cpu"):
    made = problem(choose, kind, dtype)
    options = {"engine": engine}
    if engine == "cpu":
        options["rows"] = choose.pick(ROWS)
        options["threads"] = choose.integer(1, 4)
        if one_in(choose, 3):
            options["tile_q"] = query_tile(choose, len(made.layout), options["rows"])
    return Case(
        made,
        options,
        choose.pick(memory.INPUT_STYLES),
        choose.pick([1.0, 1.0, 0.1, 4.0]),
        choose.integer(0, 2**31 - 1),
    )


def strategy(kind, dtype, engine="cpu"):
    return st.composite(lambda draw: case(HypothesisChooser(draw), kind, dtype, engine))()


def bias_values(problem, rng):
    """Some keys hidden, some queries with nothing to see, some heads or batch entries shared."""
    batch = problem.batch if rng.random() < 0.6 else 1
    count = problem.heads if rng.random() < 0.6 else 1
    bias = rng.standard_normal((batch, count, problem.queries, problem.keys))
    bias[rng.random(bias.shape) < rng.choice([0.0, 0.2, 0.9])] = -np.inf
    bias[rng.random(bias.shape[:3]) < rng.choice([0.0, 0.2])] = -np.inf
    return bias


def tensors(case, rng):
    """Inputs of the case, placed in memory."""
    made = case.problem
    dtype = memory.DTYPES[made.dtype]
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if made.additional_tokens else []
    values = {}
    for name in names:
        spread = 1.0 if "value" in name else case.spread
        values[name] = memory.put(rng.standard_normal(made.shape(name)) * spread, dtype, case.style, rng)
    if made.rpb:
        kind = dtype if rng.random() < 0.4 else memory.DTYPES[str(rng.choice(["float32", "float64"]))]
        values["rpb"] = memory.put(rng.standard_normal(made.shape("rpb")), kind, case.style, rng)
    if made.attn_bias:
        kind = memory.DTYPES[str(rng.choice(list(memory.DTYPES)))]
        values["attn_bias"] = memory.put(bias_values(made, rng), kind, case.style, rng)
    return values


def output_style(case):
    return case.style if case.style in memory.STYLES else "sliced"

"""One problem of problems_gpu.json as calls that can be timed: those of vicus, and those of its peers.

Every call comes with several sets of inputs and goes round, so that a small problem does not find its tensors in the
second-level cache. Peers get their best case: no masks, block masks or permutations are timed.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vicus import _arguments, _ops, merge_attentions, unfused

Problem = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BLOCK = 128  # FlexAttention's block of queries and keys
TILES = {1: (128,), 2: (8, 16), 3: (2, 8, 8)}  # of BLOCK tokens: the boxes that FlexAttention's blocks are
MOST_SETS = 8
TOP_LEFT, BOTTOM_RIGHT = 1, 2  # a problem's "causal"
# What is measured, where a problem does not name its "passes": backward with keys in parallel, and without atomics.
PASSES = ("forward", "backward", "deterministic")


def dtype_of(problem: Problem) -> torch.dtype:
    return DTYPES[problem.get("dtype", "bfloat16")]


def shapes_of(problem: Problem) -> list[tuple[int, ...]]:
    """Of query, key, value and the gradient of the output: heads last."""
    batch, layout, heads, dim = (problem[name] for name in ("batch", "layout", "heads", "head_dim"))
    queries = (batch, *layout, heads, dim)
    keys = (batch, *([problem["keys"]] if "keys" in problem else layout), problem.get("heads_kv", heads), dim)
    return [queries, keys, keys, queries]


class Inputs:
    """Sets of query, key, value and the gradient of the output, `[B, *X, H, D]`: twice the L2 cache in all."""

    def __init__(self, problem: Problem) -> None:
        shapes, dtype = shapes_of(problem), dtype_of(problem)
        one = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        generator = torch.Generator("cuda").manual_seed(2)
        count = min(MOST_SETS, max(1, math.ceil(2 * cache / one)))
        self.sets = [
            [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]
            for _ in range(count)
        ]


@functools.cache
def _ends(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device="cuda")


def lists_of(problem: Problem) -> list[torch.Tensor]:
    """Cumulative lengths of the queries and keys of packed sequences, `[0, n0, n0 + n1, ...]`, on the device."""
    return [_ends(tuple(problem["lengths"]))] * 2


def rounds(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


# --- vicus -----------------------------------------------------------------------------------------------------------


def mask_of(problem: Problem) -> list[int]:
    """Kernel size, stride, dilation and causality, as the operators take them; empty for dense attention."""
    if problem["mask"] == "dense":
        return []
    ones = [1] * len(problem["layout"])
    lists = [problem["kernel_size"], problem.get("stride", ones), problem.get("dilation", ones)]
    lists.append(problem.get("causal_axes", [0] * len(ones)))
    return [n for values in lists for n in values]


def options_of(way: str, engine: str = "auto") -> tuple[int, ...]:
    return _arguments.pack_options(engine, deterministic=way == "deterministic", kv_parallelism=way != "deterministic")


def forward(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, engine: str = "auto") -> torch.Tensor:
    scale, mask = problem["head_dim"] ** -0.5, mask_of(problem)
    if "lengths" in problem:
        absent, settings = [None] * 4, _settings(problem, options_of("forward", engine))
        return _ops.dense(q, k, v, *absent, *lists_of(problem), *settings)[0]
    if mask:
        return _ops.neighborhood_inference(q, k, v, mask, scale)
    return _ops.dense_inference(q, k, v, int(problem.get("causal", False)), -1, -1, scale)


def _settings(problem: Problem, options: tuple[int, ...]) -> list[Any]:
    scale, mask, rank = problem["head_dim"] ** -0.5, mask_of(problem), len(problem["layout"])
    if mask:
        return [*(mask[i * rank : (i + 1) * rank] for i in range(4)), scale, options]
    longest = [max(problem.get("lengths", [0]))] * 2  # 0: nothing is packed
    return [*longest, int(problem.get("causal", False)), -1, -1, scale, options]


def backward_call(problem: Problem, given: list[torch.Tensor], way: str, engine: str = "auto") -> Callable[[], Any]:
    q, k, v, g = given
    neighborhood = bool(mask_of(problem))
    absent: list[Any] = [None] * (3 if neighborhood else 6)  # additional tokens, bias, lists
    if "lengths" in problem:
        absent[4:] = lists_of(problem)
    settings = _settings(problem, options_of(way, engine))
    ahead = _ops.neighborhood if neighborhood else _ops.dense
    back = _ops.neighborhood_backward if neighborhood else _ops.dense_backward
    output, logsumexp = ahead(q, k, v, *absent, *settings)
    return lambda: back(g, None, q, k, v, *absent, output, logsumexp, *settings, 0b111)


def vicus_calls(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """By pass."""

    def one(way: str, given: list[torch.Tensor]) -> Callable[[], Any]:
        if way == "forward":
            return functools.partial(forward, problem, *given[:3])
        return backward_call(problem, given, way)

    return {way: rounds([one(way, given) for given in inputs.sets]) for way in problem.get("passes", PASSES)}


def plan_of(problem: Problem, inputs: Inputs, way: str) -> dict[str, Any]:
    """Counts of the plan, and its kernels."""
    q, k, v = inputs.sets[0][:3]
    backward = way != "forward"
    causal, lengths = int(problem.get("causal", False)), problem.get("lengths", [])
    packed = [len(lengths), max(lengths), max(lengths)] if lengths else []
    lines = torch.ops.vicus.gpu_report(q, k, v, mask_of(problem), causal, options_of(way), backward, packed)
    plan, *kernels = [json.loads(line) for line in lines]
    if lengths:  # the plan only knows the longest
        pairs = problem["heads"] * sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
        plan |= {"mask_pairs": pairs, "flops": pairs * problem["head_dim"] * (10 if backward else 4)}
    return {**plan, "kernels": kernels}


# --- Operators that are not fused: calls and the bytes they cannot but move -------------------------------------------


def operator_calls(problem: Problem) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Calls by pass, and bytes by pass with each tensor moved once."""
    dtype, size = dtype_of(problem), dtype_of(problem).itemsize
    batch, heads, dim = problem["batch"], problem["heads"], problem["head_dim"]
    rows = batch * heads * math.prod(problem["layout"])

    def made(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=kind).requires_grad_()

    if problem["operator"] == "merge":
        tokens = (batch, *problem["layout"], heads)
        tensors = [made(*tokens, dim), made(*tokens, dim), made(*tokens, kind=torch.float32)]
        tensors.append(made(*tokens, kind=torch.float32))
        function = lambda a, b, x, y: merge_attentions([a, b], [x, y])[0]  # noqa: E731
        part = rows * (dim * size + 4)
        moved = {"forward": 3 * part, "backward": 5 * part}
    else:
        slots = math.prod(problem["kernel_size"])
        first = made(batch, heads, *problem["layout"], dim if problem["operator"] == "qk" else slots)
        tensors = [first, made(batch, heads, *problem["layout"], dim)]
        name = f"na{len(problem['layout'])}d_{problem['operator']}"
        function = functools.partial(getattr(unfused, name), kernel_size=tuple(problem["kernel_size"]))
        forward_bytes = rows * (2 * dim + slots) * size
        moved = {
            "forward": forward_bytes,
            "backward": rows * (4 * dim + (1 if name.endswith("qk") else 2) * slots) * size,
        }

    def ahead() -> torch.Tensor:
        with torch.no_grad():
            return function(*tensors)

    output = function(*tensors)
    grad = torch.randn_like(output)
    back = lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True)  # noqa: E731
    return {"forward": ahead, "backward": back}, moved


# --- Peers -----------------------------------------------------------------------------------------------------------


class Tiled:
    """Tokens of a layout in the order of tiles, and the windows over them as tables."""

    def __init__(self, problem: Problem) -> None:
        layout, rank = problem["layout"], len(problem["layout"])
        tile, strides = TILES[rank], problem.get("stride", [1] * rank)
        tiles = [math.ceil(n / t) for n, t in zip(layout, tile, strict=True)]
        self.length = math.prod(tiles) * BLOCK
        grid = torch.cartesian_prod(*(torch.arange(n) for n in (*tiles, *tile))).reshape(-1, 2 * rank)
        inside = torch.ones(self.length, dtype=torch.bool)
        self.token = torch.zeros(self.length, dtype=torch.int64)
        self.tables = []
        for axis, n in enumerate(layout):
            place = grid[:, axis] * tile[axis] + grid[:, rank + axis]
            inside &= place < n
            self.token = self.token * n + place.clamp(max=n - 1)
            window, step = min(problem["kernel_size"][axis], n), strides[axis]
            leader = (place // step * step + step // 2).clamp(max=n - 1)
            begin = (leader - window // 2).clamp(0, n - window)
            self.tables.append([place, begin, begin + window])
        for place, _, end in self.tables:
            place[~inside], end[~inside] = -1, 0
        self.tables = [[x.int().cuda() for x in table] for table in self.tables]
        self.inside, self.token = inside.cuda(), self.token.cuda()

    def mask_function(self) -> Callable[..., torch.Tensor]:
        tables = self.tables  # of a function, not of an object: what torch.compile follows

        def sees(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = None
            for place, begin, end in tables:
                here = (begin[q] <= place[k]) & (place[k] < end[q])
                seen = here if seen is None else seen & here
            return seen

        return sees

    def blocks(self) -> tuple[BlockMask, int]:
        """The mask for flex_attention, and the pairs that it lets through."""
        keys, count, sees = torch.arange(self.length, device="cuda"), [], self.mask_function()
        for first in range(0, self.length, BLOCK):
            seen = sees(0, 0, keys[first : first + BLOCK, None], keys[None])
            count.append(seen.view(BLOCK, -1, BLOCK).sum((0, 2)))
        table = torch.stack(count)
        full = table == BLOCK * BLOCK
        lists = []
        for which in ((table > 0) & ~full, full):
            order = torch.argsort(which.to(torch.int8), dim=1, descending=True, stable=True).int()
            lists += [which.sum(1, dtype=torch.int32)[None, None], order[None, None]]
        size = (self.length, self.length)
        mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=size)
        return mask, int(table.sum())

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *X, H, D] -> [B, H, length, D], contiguous."""
        flat = x.flatten(1, -3)[:, self.token] * self.inside[:, None, None].to(x.dtype)
        return flat.transpose(1, 2).contiguous()

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse for outputs: [B, tokens, H, D]."""
        flat = x.transpose(1, 2)[:, self.inside]
        made = torch.empty_like(flat)
        made[:, self.token[self.inside]] = flat
        return made


class OtherEngine:
    """An engine of vicus that is not its choice, as a peer."""

    pairs = None

    def __init__(self, problem: Problem, name: str, inputs: Inputs) -> None:
        self.problem, self.name, self.sets = problem, name, inputs.sets

    def result(self) -> torch.Tensor:
        return forward(self.problem, *self.sets[0][:3], self.name)

    def calls(self) -> dict[str, Callable[[], Any]]:
        @functools.cache
        def back(i: int) -> Callable[[], Any]:
            return backward_call(self.problem, self.sets[i], "backward", self.name)

        ahead = [functools.partial(forward, self.problem, *given[:3], self.name) for given in self.sets]
        return {
            "forward": rounds(ahead),
            "backward": rounds([lambda i=i: back(i)() for i in range(len(self.sets))]),
        }


class Peer:
    """One way of PyTorch to compute a problem. What it does not take raises as PyTorch does."""

    def __init__(self, problem: Problem, name: str, inputs: Inputs) -> None:
        self.pairs: int | None = None
        self.tiled = Tiled(problem) if name == "flex" else None
        if self.tiled is not None:
            mask, pairs = self.tiled.blocks()
            self.pairs = pairs * problem["batch"] * problem["heads"]
            compiled = torch.compile(flex_attention, dynamic=False)
            self.attend = functools.partial(compiled, block_mask=mask)
            order = self.tiled.ordered
        elif name == "varlen":
            self.attend = functools.partial(self._varlen, problem, *lists_of(problem))
            order = self._heads_first
        else:
            causal, gqa = (
                int(problem.get("causal", False)),
                problem.get("heads_kv", problem["heads"]) != problem["heads"],
            )
            queries, keys = (shape[1] for shape in shapes_of(problem)[:2])
            mask = causal_lower_right(queries, keys) if causal == BOTTOM_RIGHT else None
            attend = functools.partial(
                F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal == TOP_LEFT, enable_gqa=gqa
            )
            self.attend = functools.partial(self._sdpa, attend, SDPA[name])
            order = self._heads_first
        self.sets = [[order(x) for x in given] for given in inputs.sets]
        for given in self.sets:
            for x in given[:3]:
                x.requires_grad_()

    @staticmethod
    def _heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, -3).transpose(1, 2)  # a view: what these kernels like best

    @staticmethod
    def _sdpa(attend: Callable[..., torch.Tensor], backend: SDPBackend, *tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return attend(*tensors)

    @staticmethod
    def _varlen(problem: Problem, at_q: torch.Tensor, at_k: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest, window = max(problem["lengths"]), (-1, 0 if problem.get("causal", False) else -1)
        rows = [x[0].transpose(0, 1) for x in tensors]  # views of what was given
        return varlen_attn(*rows, at_q, at_k, longest, longest, window_size=window).transpose(0, 1)[None]

    def result(self) -> torch.Tensor:
        """Output of the first set, `[B, tokens, H, D]`."""
        with torch.no_grad():
            found = self.attend(*self.sets[0][:3])
        return self.tiled.restored(found) if self.tiled else found.transpose(1, 2)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """By pass; "backward" is prepared when it is first called."""

        def ahead(given: list[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return self.attend(*given[:3])

        @functools.cache
        def outputs() -> list[torch.Tensor]:
            return [self.attend(*given[:3]) for given in self.sets]

        def back(i: int) -> Any:
            given = self.sets[i]
            return torch.autograd.grad(outputs()[i], given[:3], given[3], retain_graph=True)

        return {
            "forward": rounds([functools.partial(ahead, given) for given in self.sets]),
            "backward": rounds([functools.partial(back, i) for i in range(len(self.sets))]),
        }

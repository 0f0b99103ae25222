"""PyTorch's ways to compute one attention problem, timed on request.

A process of its own, so that PyTorch's OpenMP runtime never meets that of vicus. Reads one JSON request per line from
standard input and answers each with one JSON line:

    {"versions": true}                                            -> {"torch": ..., ...}
    {"problem": {...}, "peer": "sdpa", "pass": "forward", "threads": 2, "repeats": 3,
     "least_seconds": 0.2, "most_seconds": 5.0, "longest_mask": 32768}
        -> {"seconds": [...], "mask_pairs": ...} or {"unsupported": "reason"}

Inputs are heads first and contiguous, PyTorch's best case. What a training step would not redo is not timed: masks,
block masks and compilation are made on the first request for a problem. Where a mask was made, the answer also counts
its pairs, so that the caller can see that everybody computes the same problem.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORTEST_SAMPLE = 100e-6  # seconds
BLOCK = 128  # flex_attention's block of queries and of keys


class Unsupported(Exception):
    """The peer does not take the problem; the text is the reason."""


def mask_function(problem: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """`mask_mod` of flex_attention; also takes whole tensors of query and key indices.

    Looks positions up in tables: compiled for the CPU, up to 2.6 times as fast as the divisions that turn an index
    into positions (56 x 56, window 13, one thread of an AMD EPYC, family 26: 88 ms and 229 ms).
    """
    if problem["mask"] == "dense":
        return lambda b, h, q, k: k <= q
    layout = problem["layout"]
    tokens = torch.arange(math.prod(layout))
    tables = []
    for axis, (length, window) in enumerate(zip(layout, problem["kernel_size"], strict=True)):
        width = min(window, length)
        position = tokens // math.prod(layout[axis + 1 :]) % length
        begin = torch.clamp(position - width // 2, 0, length - width)
        tables.append((position.int(), begin.int(), (begin + width).int()))

    def neighborhood(b, h, q, k):
        seen = None
        for position, begin, end in tables:
            here = (begin[q] <= position[k]) & (position[k] < end[q])
            seen = here if seen is None else seen & here
        return seen

    return neighborhood


def block_mask(problem: dict[str, Any]) -> tuple[BlockMask, int]:
    """What create_block_mask makes, and how many pairs it lets through.

    Goes by rows of blocks: create_block_mask would hold all pairs of a long sequence at once.
    """
    tokens = math.prod(problem["layout"])
    mod, blocks = mask_function(problem), math.ceil(tokens / BLOCK)
    keys, pairs = torch.arange(tokens), 0
    partial, full = torch.zeros(blocks, blocks, dtype=torch.bool), torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        queries = torch.arange(row * BLOCK, min(tokens, (row + 1) * BLOCK))
        seen = mod(0, 0, queries[:, None], keys[None, :])
        seen = torch.nn.functional.pad(seen, (0, blocks * BLOCK - tokens, 0, BLOCK - len(queries)))
        count = seen.view(BLOCK, blocks, BLOCK).sum(dim=(0, 2))
        pairs += int(count.sum())
        full[row], partial[row] = count == BLOCK * BLOCK, (count > 0) & (count < BLOCK * BLOCK)

    def ordered(which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(which.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
        return which.sum(dim=1, dtype=torch.int32)[None, None], order[None, None]

    mask = BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(tokens, tokens)
    )
    return mask, pairs


def dense_mask(problem: dict[str, Any], longest: int) -> torch.Tensor:
    tokens = math.prod(problem["layout"])
    if tokens > longest:
        raise Unsupported(f"a dense mask of {tokens} x {tokens} is not made")
    index = torch.arange(tokens)
    mod = mask_function(problem)
    rows = [mod(0, 0, index[i : i + BLOCK, None], index[None, :]) for i in range(0, tokens, BLOCK)]
    return torch.cat(rows)


class Peer:
    """One peer's call on one problem: `forward()` and `backward()` run it once."""

    def __init__(self, problem: dict[str, Any], peer: str, differentiate: bool, longest_mask: int) -> None:
        tokens = math.prod(problem["layout"])
        shape = (problem.get("batch", 1), problem["heads"], tokens, problem["head_dim"])
        dtype = DTYPES[problem.get("dtype", "float32")]
        generator = torch.Generator().manual_seed(2)
        made = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for _ in range(4)]
        self.inputs = [x.requires_grad_(differentiate) for x in made[:3]]
        self.grad_output = made[3]
        self.mask_pairs: int | None = None
        self.call = self._call(problem, peer, longest_mask)
        self.output = self.call(*self.inputs)
        if differentiate:
            self.backward()

    def _call(self, problem: dict[str, Any], peer: str, longest_mask: int) -> Callable[..., torch.Tensor]:
        causal = bool(problem.get("causal", False))
        if peer == "sdpa":
            if problem["mask"] != "dense":
                raise Unsupported("has no neighborhood mask; see sdpa-mask")

            def sdpa(q, k, v):
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return scaled_dot_product_attention(q, k, v, is_causal=causal)

            return sdpa
        if peer == "sdpa-mask":
            if problem["mask"] == "dense":
                raise Unsupported("needs no mask; see sdpa")
            mask = dense_mask(problem, longest_mask)
            self.mask_pairs = self._all_heads(problem, int(mask.sum()))

            def masked(q, k, v):
                with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                    return scaled_dot_product_attention(q, k, v, attn_mask=mask)

            return masked
        if peer == "flex":
            if problem["mask"] == "dense" and not causal:
                raise Unsupported("needs no mask; see sdpa")
            mask, pairs = block_mask(problem)
            self.mask_pairs = self._all_heads(problem, pairs)
            compiled = torch.compile(flex_attention, dynamic=False)
            return lambda q, k, v: compiled(q, k, v, block_mask=mask)
        raise ValueError(f"peer is {peer}; allowed: sdpa, sdpa-mask, flex")

    @staticmethod
    def _all_heads(problem: dict[str, Any], pairs: int) -> int:
        return pairs * problem.get("batch", 1) * problem["heads"]

    def forward(self) -> None:
        with torch.no_grad():
            self.call(*self.inputs)

    def backward(self) -> None:
        torch.autograd.grad(self.output, self.inputs, self.grad_output, retain_graph=True)


class Bench:
    """Keeps what was made for the last problem, so that rounds can interleave peers."""

    def __init__(self) -> None:
        self.problem: dict[str, Any] | None = None
        self.made: dict[tuple[str, bool], Peer | str] = {}

    def peer(self, problem: dict[str, Any], name: str, differentiate: bool, longest_mask: int) -> Peer:
        if problem != self.problem:
            self.problem, self.made = problem, {}
            torch.compiler.reset()
        key = (name, differentiate)
        if key not in self.made:
            try:
                self.made[key] = Peer(problem, name, differentiate, longest_mask)
            except Unsupported as error:
                self.made[key] = str(error)
            except Exception as error:  # whatever PyTorch says is the reason
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                # What was compiled before would run uncompiled from now on: it is made again when it is asked for.
                torch.compiler.reset()
                self.made = {key: made for key, made in self.made.items() if isinstance(made, str)}
                self.made[key] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        made = self.made[key]
        if isinstance(made, str):
            raise Unsupported(made)
        return made

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("versions"):
            return {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "mkl": torch.backends.mkl.is_available(),
            }
        if torch.get_num_threads() != request["threads"]:
            torch.set_num_threads(request["threads"])
        backward = request["pass"] == "backward"
        try:
            peer = self.peer(request["problem"], request["peer"], backward, request.get("longest_mask", 2**15))
            seconds = time_calls(peer.backward if backward else peer.forward, request)
        except Unsupported as error:
            return {"unsupported": str(error)}
        except RuntimeError as error:  # what PyTorch raises when memory does not suffice
            if "allocate memory" not in str(error):
                raise
            return {"unsupported": "needs more memory than this machine has"}
        return {"seconds": seconds, "mask_pairs": peer.mask_pairs}


def time_calls(step: Callable[[], None], request: dict[str, Any]) -> list[float]:
    """As bench/timing.cc does it. The first call of a peer was made when the peer was."""
    start = time.perf_counter()
    step()
    one = time.perf_counter() - start
    if one >= request["most_seconds"]:
        return [one]
    calls = 1 if one >= SHORTEST_SAMPLE else int(SHORTEST_SAMPLE / max(one, 1e-7)) + 1
    samples, begin = [], time.perf_counter()
    while (spent := time.perf_counter() - begin) < request["most_seconds"]:
        if len(samples) >= request["repeats"] and spent >= request["least_seconds"]:
            break
        start = time.perf_counter()
        for _ in range(calls):
            step()
        samples.append((time.perf_counter() - start) / calls)
    return samples


def main() -> None:
    bench = Bench()
    for line in sys.stdin:
        print(json.dumps(bench.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""A few small problems that together launch every kernel: what compute-sanitizer watches (bench/gpu_test.py starts it).

    PYTHONPATH=python:tests/python compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --run-only

Without PyTorch's cache of memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1) each tensor is an allocation of its own, so that a
read or write beside one is seen. Results are compared with the oracle first, unless --run-only is given.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from gpu_check import backward, by_engine, check, check_forward, forward, inference
from gpu_problems import Case, dense, neighborhood, tensors

import vicus


def cases() -> list[Case]:
    na, small = neighborhood, {"batch": 1}
    f16, f32, f64 = ({"dtype": name, "batch": 1} for name in ("float16", "float32", "float64"))
    problems = {
        "1d": na((70,), 17, **small),
        "1d causal, dilated, grouped": na((75,), 9, step=4, dilation=2, causal=1, heads=4, kv=2, dim=128, **f16),
        "2d": na((18, 19), 7, **small),
        "2d, more tokens and bias": na((13, 14), (5, 7), additional_tokens=20, rpb=True, heads=4, kv=2, **small),
        "2d, odd dims": na((12, 13), 5, dim=33, dim_v=20, **f16),
        "3d": na((5, 6, 7), (3, 3, 5), step=(1, 2, 1), causal=(1, 0, 0), dim=32, **small),
        "dense": dense(130, 150, dim=64, **small),
        "dense causal, wide": dense(70, 90, "bottom_right", dim=256, **f16),
        "dense sliding": dense(150, 150, "bottom_right", left=30, right=0, heads=4, kv=1, dim=128, **small),
        "dense, bias": dense(66, 70, attn_bias=True, additional_tokens=3, **f16),
        "one token": na((1, 1), 1, **small),
        "float32": na((12, 13), 5, additional_tokens=3, rpb=True, **f32),
        "float32 dense": dense(70, 75, "top_left", dim=128, **f32),
        "float64": na((40,), 9, heads=4, kv=2, dim=40, **f64),
        "wide heads": dense(40, 50, dim=320, **small),
    }
    styles = {"2d, odd dims": "shifted", "2d": "fused", "dense": "apart"}
    return [Case(name, p, styles.get(name, "contiguous"), seed=i) for i, (name, p) in enumerate(problems.items())]


def boxes() -> list[Case]:
    """The same for engine sm90, which these would not all get by themselves; gradients in one kernel and in two."""
    na, small, f16 = neighborhood, {"batch": 1}, {"dtype": "float16", "batch": 1}
    problems = {
        "boxes: dense": dense(200, 300, heads=4, dim=128, **small),
        "boxes: three warpgroups, causal": dense(300, 300, "bottom_right", dim=64, **f16),
        "boxes: wide, more tokens": dense(70, 90, "top_left", dim=256, additional_tokens=9, **small),
        "boxes: keys in parts, several heads": dense(3, 2000, "bottom_right", heads=8, kv=2, dim=128, **small),
        "boxes: sliding, in parts": dense(90, 2500, left=1700, right=3, dim=72, dim_v=40, **f16),
        "boxes: 1d in pieces": na((900,), 50, dilation=8, heads=4, kv=2, **small),
        "boxes: 2d, dilated, more tokens": na((25, 40), (9, 20), dilation=(1, 2), additional_tokens=20, **small),
        "boxes: 2d, in parts": na((30, 30), (28, 27), causal=(1, 0), heads=1, dim=256, **small),
        "boxes: crowd": na((25, 26), (7, 5), causal=(0, 1), additional_tokens=20, heads=4, kv=2, **small),
        "boxes: crowds of gradients": na((32, 33), 9, heads=4, batch=4),
        "boxes: whole lines": na((6, 17, 10), (5, 6, 8), heads=1, dim=128, **small),
        "boxes: 3d": na((5, 12, 13), (3, 6, 7), step=(1, 2, 1), causal=(1, 0, 0), dim=32, **f16),
    }
    return [Case(name, p, seed=i) for i, (name, p) in enumerate(problems.items())]


# Of queries and keys, where others would be chosen.
TILES = {"boxes: crowd": ((0, 8, 8), (0, 2, 16)), "boxes: whole lines": ((8, 16, 1), (6, 1, 8))}


class Call(NamedTuple):
    """A call of the package with gradients for all its tensors."""

    function: Callable[..., Sequence[torch.Tensor]]
    dtype: torch.dtype
    shapes: list[tuple[int, ...]]

    def run(self, device: str) -> list[torch.Tensor]:
        """Results and gradients."""
        generator = torch.Generator().manual_seed(3)
        made = [torch.randn(shape, generator=generator).to(self.dtype).to(device) for shape in self.shapes]
        leaves = [x.requires_grad_() for x in made]
        found = self.function(*leaves)
        arriving = [torch.randn(x.shape, generator=generator).to(x.dtype).to(device) for x in found]
        return [*found, *torch.autograd.grad(found, leaves, arriving)]

    def check(self) -> None:
        """Against the engine for CPUs, which has its own tests."""
        for got, want in zip(self.run("cuda"), self.run("cpu"), strict=True):
            unit = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got.cpu(), want, rtol=16 * unit, atol=64 * unit)


def calls() -> dict[str, Call]:
    """Operators that have kernels of their own, and lists of lengths."""
    half, single = torch.bfloat16, torch.float32

    def packed(q, k, v, deterministic):
        bounds = [torch.tensor(x, dtype=torch.int32).to(q.device) for x in ([0, 30, 31, 90], [0, 80, 80, 170])]
        return vicus.attention(
            q,
            k,
            v,
            cumulative_seqlen_Q=bounds[0],
            cumulative_seqlen_KV=bounds[1],
            max_seqlen_Q=59,
            max_seqlen_KV=90,
            return_lse=True,
            deterministic=deterministic,
        )

    def padded(q, k, v, deterministic):
        lengths = torch.tensor([33, 0], dtype=torch.int32).to(q.device)
        return vicus.attention(q, k, v, key_lengths=lengths, return_lse=True, deterministic=deterministic)

    def scores(q, k, more, table):
        return [vicus.na2d_qk(q, k, (3, 4), additional_keys=more, rpb=table)]

    def average(weights, v, more):
        return [vicus.na2d_av(weights, v, (3, 4), additional_values=more)]

    def merged(*parts):
        return torch.ops.vicus.merge(parts[: len(parts) // 2], parts[len(parts) // 2 :])

    lists = {"packed": (packed, [(1, 90, 4, 64), (1, 170, 2, 64), (1, 170, 2, 64)])}
    lists["padded"] = padded, [(2, 40, 4, 40), (2, 70, 2, 40), (2, 70, 2, 24)]
    # Long head dims.
    lists["packed, wide"] = packed, [(1, 90, 4, 256), (1, 170, 2, 256), (1, 170, 2, 256)]
    lists["padded, wide"] = padded, [(2, 40, 4, 200), (2, 70, 2, 200), (2, 70, 2, 200)]
    found = {
        f"{name}, {'deterministic' if way else 'with atomics'}, {dtype}": Call(
            functools.partial(function, deterministic=way), dtype, shapes
        )
        for name, (function, shapes) in lists.items()
        for way in (True, False)
        for dtype in (half, single)
    }
    for dtype in (half, single):
        tokens = [(1, 2, 9, 10, 32), (1, 1, 9, 10, 32), (1, 1, 5, 32)]
        found[f"scores, {dtype}"] = Call(scores, dtype, [*tokens, (2, 5, 7)])
        found[f"average, {dtype}"] = Call(average, dtype, [(1, 2, 9, 10, 17), *tokens[1:]])
    for parts in (3, 40):
        found[f"{parts} parts merged"] = Call(merged, single, [(1, 9, 2, 40)] * parts + [(1, 9, 2)] * parts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-only", action="store_true", help="launch every kernel, compare nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains TEXT")
    arguments = parser.parse_args()
    for case in cases():
        if arguments.only not in case.name:
            continue
        p = case.problem
        print(case.name, flush=True)
        if not arguments.run_only:
            check(case)
            continue
        # Made on the CPU: only our kernels run on the GPU.
        t = {name: None if x is None else x.cuda() for name, x in tensors(case, "cpu").items()}
        saved = forward(p, t)
        for deterministic in (True, False):
            backward(p, t, saved, deterministic)
        if not (p.additional_tokens or p.rpb or p.attn_bias):
            inference(p, t)
        torch.cuda.synchronize()
    for case in boxes() if torch.cuda.get_device_capability() == (9, 0) else []:
        if arguments.only not in case.name:
            continue
        print(case.name, flush=True)
        if not arguments.run_only:
            check_forward(case, by_engine("sm90", *TILES.get(case.name, ())))
            continue
        t = {name: None if x is None else x.cuda() for name, x in tensors(case, "cpu").items()}
        saved = forward(case.problem, t, by_engine("sm90", *TILES.get(case.name, ())))
        for deterministic in (True, False):
            backward(case.problem, t, saved, deterministic, "sm90")
        torch.cuda.synchronize()
    for name, call in calls().items():
        if arguments.only not in name:
            continue
        print(name, flush=True)
        if arguments.run_only:
            call.run("cuda")
        else:
            call.check()
        torch.cuda.synchronize()
    if not any(arguments.only in name for name in (*(c.name for c in (*cases(), *boxes())), *calls())):
        parser.error(f"--only is {arguments.only}; allowed: part of a problem's name")
    print("done")


if __name__ == "__main__":
    main()

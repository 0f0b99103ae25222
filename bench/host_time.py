"""Host time of one call on a tiny problem, in microseconds, beside PyTorch's own attention on as many tokens.

    python bench/host_time.py [--device cuda]

One thread; the smallest mean of several rounds, because whatever else the machine does only adds. On a GPU, until the
call returns: a problem this small is computed faster than calls follow each other.
"""

import argparse
import functools
import time

import torch
import torch.nn.functional as F

import vicus

CALLS, ROUNDS = 1000, 20
CALLED = {
    "SDPA": F.scaled_dot_product_attention,
    "na1d": functools.partial(vicus.na1d, kernel_size=3),
    "na2d": functools.partial(vicus.na2d, kernel_size=3),
    "na3d": functools.partial(vicus.na3d, kernel_size=2),
    "attention": vicus.attention,
}


def microseconds(call, wait) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    print(f"{'16 tokens, 1 head of 32':28}{'inference':>12}{'ratio':>8}{'training':>12}{'ratio':>8}")
    base = {}
    for name in CALLED:
        cells = []
        for grad in (False, True):
            layout = {"na2d": (4, 4), "na3d": (2, 2, 4)}.get(name, (16,))
            shape = (1, 1, 16, 32) if name == "SDPA" else (1, *layout, 1, 32)
            q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=grad) for _ in range(3))
            spent = microseconds(functools.partial(CALLED[name], q, k, v), wait)
            base.setdefault(grad, spent)
            cells.append(f"{spent:12.2f}{spent / base[grad]:8.2f}")
        print(f"{name:28}{''.join(cells)}")


if __name__ == "__main__":
    main()

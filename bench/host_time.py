"""Host time of one call on a tiny problem, in microseconds, beside PyTorch's own attention on as many tokens.

    python bench/host_time.py

One thread; the smallest mean of several rounds, because whatever else the machine does only adds.
"""

import functools
import time

import torch
import torch.nn.functional as F

import vicus

CALLS, ROUNDS = 2000, 10
CALLED = {
    "SDPA": F.scaled_dot_product_attention,
    "na1d": functools.partial(vicus.na1d, kernel_size=3),
    "na2d": functools.partial(vicus.na2d, kernel_size=3),
    "na3d": functools.partial(vicus.na3d, kernel_size=2),
    "attention": vicus.attention,
}


def microseconds(call) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'16 tokens, 1 head of 32':28}{'inference':>12}{'ratio':>8}{'training':>12}{'ratio':>8}")
    base = {}
    for name in CALLED:
        cells = []
        for grad in (False, True):
            layout = {"na2d": (4, 4), "na3d": (2, 2, 4)}.get(name, (16,))
            shape = (1, 1, 16, 32) if name == "SDPA" else (1, *layout, 1, 32)
            q, k, v = (torch.randn(shape, requires_grad=grad) for _ in range(3))
            spent = microseconds(functools.partial(CALLED[name], q, k, v))
            base.setdefault(grad, spent)
            cells.append(f"{spent:12.2f}{spent / base[grad]:8.2f}")
        print(f"{name:28}{''.join(cells)}")


if __name__ == "__main__":
    main()

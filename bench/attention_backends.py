"""Measures the backends of attention layers on this machine: the table by which `vicus.nn` prefers one.

    python bench/attention_backends.py                  # print
    python bench/attention_backends.py --write          # and put the rows into python/vicus/nn/preference.json

Each problem is computed by every backend that takes it, in turns; the figure is the useful work over the best time, as
whatever else the machine does only adds.
Rows of the same architecture, pass, mask, head dim and length are replaced, all others stay.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vicus.nn import DotProductAttention, Neighborhood, choice, preference

TABLE = Path(__file__).resolve().parents[1] / "python" / "vicus" / "nn" / "preference.json"
WINDOW = 256  # keys that a query sees in a sliding window
KERNEL = 7  # per axis, of neighborhoods
BACKWARD = 2.5  # work of a backward pass, in forward passes
LEAST_SECONDS = {"cpu": 0.1, "cuda": 0.02}  # calls are repeated until they take as long
ROUNDS = 7
FAR = 4  # a backend that took as many times as long as the best in the first round is not measured again


def layer_of(mask: str, heads: int, head_dim: int, tokens: int, backend: str) -> tuple[DotProductAttention, int]:
    """A layer of one backend, and the pairs that its mask lets through."""
    options: dict[str, Any] = {"qkv_format": "bshd", "attention_backend": backend, "attn_mask_type": "no_mask"}
    pairs = tokens**2
    if mask in ("causal", "window"):
        options["attn_mask_type"] = "causal"
        pairs = tokens * (tokens + 1) // 2
    if mask == "window":
        options["window_size"] = (WINDOW - 1, 0)
        pairs = sum(min(i + 1, WINDOW) for i in range(tokens))
    if mask == "neighborhood":
        side = round(tokens**0.5)
        options["neighborhood"] = Neighborhood((side, side), KERNEL)
        pairs = tokens * KERNEL**2
    return DotProductAttention(heads, head_dim, **options), pairs


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Time of one call, by as many calls as the device needs for a steady figure."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    least = LEAST_SECONDS[device.type]
    calls, spent = 1, 0.0
    while True:
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        spent = time.perf_counter() - begin
        if spent >= least or calls >= 1 << 14:
            return spent / calls
        calls = max(calls + 1, int(calls * min(least / max(spent, 1e-9), 16)))


def measure(
    mask: str, heads: int, head_dim: int, tokens: int, training: bool, device: torch.device
) -> dict[str, float]:
    """Useful TFLOP/s of every backend that takes the problem, and whose memory the device has."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype, requires_grad=training) for _ in range(3)
    )
    arriving = torch.randn(1, tokens, heads * head_dim, device=device, dtype=dtype)
    calls: dict[str, Callable[[], None]] = {}
    for backend in choice.NAMES:
        layer, pairs = layer_of(mask, heads, head_dim, tokens, backend)
        if layer.explain(q, k, v).backend is None:
            continue

        def call(layer: DotProductAttention = layer) -> None:
            output = layer(q, k, v)
            if training:
                torch.autograd.grad(output, (q, k, v), arriving)

        try:
            call()
        except torch.OutOfMemoryError:  # all pairs of a long sequence, for example
            torch.cuda.empty_cache()
            continue
        calls[backend] = call
    times: dict[str, list[float]] = {backend: [] for backend in calls}
    for turn in range(ROUNDS):
        for backend, call in calls.items():
            best = min((min(spent) for spent in times.values() if spent), default=0.0)
            if turn and min(times[backend]) > FAR * best:  # whose figure matters no more
                continue
            times[backend].append(seconds(call, device))
    work = 4 * head_dim * pairs * heads * (1 + BACKWARD if training else 1)
    return {backend: float(f"{work / min(spent) / 1e12:.3g}") for backend, spent in times.items()}


def processor() -> str:
    """Its name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(rows: list[dict[str, Any]], name: str, source: dict[str, str]) -> None:
    """Puts rows into the table, a line each."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[part] for part in ("architecture", "pass", "mask", "head_dim", "tokens"))

    measured = {key(row) for row in rows}
    rows = sorted([row for row in table["rows"] if key(row) not in measured] + rows, key=key)
    sources = {word: about for word, about in table["sources"].items() if any(row["source"] == word for row in rows)}
    sources[name] = source
    text = json.dumps({"how": table["how"], "sources": sources}, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    TABLE.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the rows of the table that is checked in")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths (default: by the device)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    capability = torch.cuda.get_device_capability() if gpu else None
    architecture = preference.architecture_of(device.type, capability)
    today = datetime.date.today().isoformat()
    name = f"{architecture}-{today}"
    heads = 16 if gpu else 8
    machine = torch.cuda.get_device_name() if gpu else f"{processor()}, {options.threads} threads"
    source = {
        "machine": f"{machine}, PyTorch {torch.__version__}",
        "date": today,
        "how": f"bench/attention_backends.py: {'bfloat16' if gpu else 'float32'}, batch 1, {heads} heads, window"
        f" {WINDOW}, neighborhood {KERNEL}x{KERNEL}, the best of {ROUNDS} rounds in turns; load of the machine before:"
        f" {os.getloadavg()[0]:.1f}",
    }
    rows = []
    for training in (False, True):
        for mask in ("full", "causal", "window", "neighborhood"):
            for head_dim in (64, 128):
                for tokens in options.tokens or ((1024, 4096, 16384) if gpu else (256, 1024, 4096)):
                    figures = measure(mask, heads, head_dim, tokens, training, device)
                    row = {"architecture": architecture, "pass": "training" if training else "forward", "mask": mask}
                    row |= {"head_dim": head_dim, "tokens": tokens, "tflops": figures, "source": name}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    if options.write:
        write(rows, name, source)


if __name__ == "__main__":
    main()

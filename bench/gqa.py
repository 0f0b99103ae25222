"""What groups of heads save: parameters, bytes of the KV cache and time of self-attention with 32 heads, as a table.

    python bench/gqa.py                      # bfloat16 on a GPU, float32 on CPUs
    python bench/gqa.py --tokens 4096 --threads 8

A row for every head its own keys and values (MHA), for groups of four that share (GQA), and for one pair for all (MQA).
Times are the best of rounds in which the rows take turns (whatever else the machine does only adds): of the layer,
forward and with its backward pass; and of the attention of one new token to a full cache, as in generation.
"""

import argparse
import time
from collections.abc import Callable

import torch

from vicus.nn import SelfAttention, TransformerConfig

HEADS, ROUNDS, LEAST_SECONDS = 32, 15, 0.1


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, by calls that fill a tenth of a second."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls = 0
    wait()
    begin = time.perf_counter()
    while time.perf_counter() - begin < LEAST_SECONDS:
        call()
        calls += 1
        wait()
    return (time.perf_counter() - begin) / calls


def milliseconds(spent: float) -> str:
    """Three digits."""
    return f"{spent * 1e3:.0f} ms" if spent >= 0.1 else f"{spent * 1e3:.3g} ms"


class Row:
    """A layer with so many groups, and what is measured of it."""

    def __init__(self, groups: int, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        config = TransformerConfig(
            hidden_size=options.hidden,
            num_attention_heads=HEADS,
            num_query_groups=groups,
            attention_dropout=0.0,
            add_bias_linear=False,
            params_dtype=dtype,
        )
        self.groups = groups
        self.layer = SelfAttention(config, device=device)
        self.parameters = sum(p.numel() for p in self.layer.parameters())
        self.cache = 2 * groups * config.kv_channels * dtype.itemsize  # bytes per token
        factory = {"device": device, "dtype": dtype}
        x = torch.randn(options.tokens, 1, options.hidden, **factory, requires_grad=True)
        arriving = torch.randn(options.tokens, 1, options.hidden, **factory)
        query = torch.randn(1, 1, HEADS, config.kv_channels, **factory)
        key, value = (torch.randn(options.cached, 1, groups, config.kv_channels, **factory) for _ in range(2))
        leaves = [x, *self.layer.parameters()]

        def forward() -> None:
            with torch.no_grad():
                self.layer(x)

        def training() -> None:
            torch.autograd.grad(self.layer(x)[0], leaves, arriving)

        def generation() -> None:
            with torch.no_grad():
                self.layer.core_attention(query, key, value, attn_mask_type="causal_bottom_right")

        self.calls = (forward, training, generation)
        self.times: tuple[list[float], ...] = ([], [], [])

    @property
    def name(self) -> str:
        """What such a layer is called."""
        return {HEADS: "MHA", 1: "MQA"}.get(self.groups, "GQA")


def main() -> None:
    """Reads the command line, measures, prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="features of a token (default: 2048)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the sequence (default: 1024)")
    parser.add_argument("--cached", type=int, default=8192, help="tokens in the cache, in generation (default: 8192)")
    parser.add_argument("--groups", type=int, nargs="+", default=[HEADS, 8, 1], help="(default: 32 8 1)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    rows = [Row(groups, options, device, dtype) for groups in options.groups]
    for row in rows:
        for call in row.calls:
            call()
    for _ in range(ROUNDS):
        for row in rows:
            for call, times in zip(row.calls, row.times, strict=True):
                times.append(seconds(call, device))
    where = torch.cuda.get_device_name() if gpu else f"{options.threads} threads"
    print(f"{where}, {str(dtype).removeprefix('torch.')}, hidden size {options.hidden}, {HEADS} heads\n")
    print(
        f"| | groups | parameters | KV cache per token | forward, {options.tokens} tokens | forward and backward"
        f" | one token, {options.cached} in the cache |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        ms = [milliseconds(min(times)) for times in row.times]
        print(f"| {row.name} | {row.groups} | {row.parameters / 1e6:.2f} M | {row.cache} bytes | {' | '.join(ms)} |")


if __name__ == "__main__":
    main()

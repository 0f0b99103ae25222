"""Problems for the GPU: a fixed list of nasty ones, and random ones. Every problem is given as the `Problem` of the
oracle in tests/python; tensors come in several ways of lying in memory."""

import dataclasses
import math
import random

import torch
from gpu_oracle import TYPES
from oracle import Dense, Neighborhood, Problem

HALF = ("bfloat16", "float16")
HEAD_DIMS = (1, 3, 8, 16, 24, 32, 40, 64, 64, 65, 80, 96, 100, 128, 128, 130, 160, 192, 256)
# How tensors lie in memory; rows of the first line start at multiples of 16 bytes where head dims allow.
STYLES = ("contiguous", "fused", "heads first", "apart", "shared")
ODD_STYLES = ("shifted", "columns")


@dataclasses.dataclass
class Case:
    name: str
    problem: Problem
    style: str = "contiguous"
    spread: float = 1.0  # of query and key
    seed: int = 0

    def __str__(self):
        return self.name


def neighborhood(layout, window, step=1, dilation=1, causal=0, heads=2, kv=None, dim=64, dim_v=None, **rest):
    rank = len(layout)
    every = [list(x) if isinstance(x, (tuple, list)) else [x] * rank for x in (window, step, dilation, causal)]
    return Problem(list(layout), heads, kv or heads, dim, dim_v or dim, Neighborhood(*every), **{**DEFAULTS, **rest})


def dense(queries, keys, causal="none", left=-1, right=-1, heads=2, kv=None, dim=64, dim_v=None, **rest):
    mask = Dense(keys, causal, left, right)
    return Problem([queries], heads, kv or heads, dim, dim_v or dim, mask, **{**DEFAULTS, **rest})


DEFAULTS = {"dtype": "bfloat16", "batch": 2}


def fixed() -> list[Case]:
    """Problems that found errors in engines, or would."""
    cases = []

    def add(name, problem, **how):
        cases.append(Case(name, problem, seed=len(cases), **how))

    na, f16 = neighborhood, {"dtype": "float16"}
    # Lengths around tiles, windows around lengths.
    for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 257):
        add(f"1d {n} in window {min(n, 31)}", na((n,), min(n, 31)))
    add("window 1", na((77,), 1))
    add("even window", na((150,), 16, **f16))
    add("window is the axis", na((64,), 64))
    add("window beyond the axis", na((50,), 90, causal=1))
    add("2d window beyond one axis", na((5, 70), (9, 9)))
    add("one token in 3d", na((1, 1, 1), 1, batch=3))
    add("thin image", na((1, 300), (1, 9)))
    add("tall image", na((300, 1), (7, 1), **f16))
    # Steps, dilation, causality.
    add("step is the window", na((200,), 16, step=16))
    add("step divides nothing", na((203,), 37, step=7))
    add("step and dilation", na((211,), 21, step=5, dilation=3, **f16))
    add("dilation beyond the axis", na((40,), 4, dilation=45))
    add("ragged classes", na((29, 31), (5, 7), dilation=(4, 3)))
    add("causal", na((333,), 64, causal=1))
    add("causal step", na((333,), 64, step=9, causal=1, **f16))
    add("causal rows", na((24, 40), (7, 7), causal=(1, 0)))
    add("causal columns, step", na((24, 40), (7, 9), step=(3, 2), causal=(0, 1)))
    add("all of it in 2d", na((23, 37), (6, 9), step=(2, 4), dilation=(3, 2), causal=(1, 0), heads=6, kv=2, dim=40))
    add("all of it in 3d", na((7, 11, 13), (3, 4, 5), (2, 1, 3), (2, 2, 1), (1, 0, 0), heads=4, kv=2, dim=32, **f16))
    add("3d blocks of windows", na((8, 16, 16), (4, 8, 8), step=(4, 8, 8)))
    add("3d small windows", na((6, 14, 14), 3, heads=3, dim=32))
    add("vision 56, window 7", na((56, 56), 7, heads=4))
    add("vision 56, window 13", na((56, 56), 13, heads=4, **f16))
    add("image 64, window 16", na((64, 64), 16, heads=3, batch=1))
    # Heads and head dims.
    add("grouped 5 to 1", na((20, 20), 5, heads=10, kv=2))
    add("one key head", na((100,), 17, heads=12, kv=1, **f16))
    add("one head", na((28, 28), 7, heads=1))
    for dim in (1, 3, 7, 8, 16, 33, 48, 72, 96, 100, 128, 136, 192, 200, 256):
        add(f"head dim {dim}", na((17, 19), 5, dim=dim, heads=2, dtype=HALF[dim % 2]))
    add("values wider", na((150,), 33, dim=32, dim_v=128))
    add("values narrower", na((150,), 33, dim=128, dim_v=8, **f16))
    add("values odd", na((20, 21), 7, dim=64, dim_v=37))
    # Additional tokens, biases, scales.
    add("1 token more", na((14, 14), 5, additional_tokens=1))
    add("130 tokens more", na((90,), 9, additional_tokens=130, heads=6, kv=2, **f16))
    add("tokens more than others", na((3, 3), 3, additional_tokens=70))
    add("causal and more", na((70,), 20, causal=1, additional_tokens=17))
    add("bias", na((14, 15), 7, rpb=True))
    add(
        "bias, dilated and causal", na((25, 26), (5, 3), dilation=(2, 3), causal=(0, 1), rpb=True, heads=4, kv=2, **f16)
    )
    add("bias in 3d, more tokens", na((5, 6, 7), (3, 4, 5), rpb=True, additional_tokens=5, dim=32))
    add("bias in 1d", na((300,), 40, rpb=True, heads=3))
    add("scale 0", na((60,), 11, scale=0.0))
    add("scale below 0", na((60,), 11, scale=-0.4, additional_tokens=3))
    add("scale 1", na((12, 12), 5, scale=1.0))
    add("large logits", na((16, 16), 7, **f16), spread=12.0)
    add("large logits, bias", na((16, 16), 7, rpb=True), spread=6.0)
    add("tiny logits", na((16, 16), 7), spread=1e-3)
    # Dense.
    for causal in ("none", "top_left", "bottom_right"):
        add(f"dense {causal}", dense(300, 300, causal, dim=128))
        add(f"dense {causal}, more keys", dense(130, 517, causal, **f16))
        add(f"dense {causal}, more queries", dense(400, 77, causal, heads=4, kv=2))
        add(f"dense {causal}, one query", dense(1, 333, causal, heads=8, kv=1))
        add(f"dense {causal}, one key", dense(65, 1, causal))
        add(f"dense {causal}, wide", dense(150, 190, causal, dim=256, **f16))
    add("dense without keys", dense(40, 0))
    add("dense, only more tokens", dense(40, 0, additional_tokens=9))
    add("sliding", dense(400, 400, left=40, right=30))
    add("sliding, rows without keys", dense(300, 60, left=3, right=3, **f16))
    add("sliding to the left", dense(400, 300, left=50))
    add("sliding, causal", dense(333, 400, "bottom_right", left=64, right=0, heads=6, kv=3))
    add("sliding, top left", dense(333, 400, "top_left", left=17))
    add("attention bias", dense(130, 150, attn_bias=True))
    add("attention bias, causal, more", dense(90, 200, "bottom_right", attn_bias=True, additional_tokens=7, **f16))
    add("grouped, causal", dense(257, 257, "bottom_right", heads=12, kv=3, dim=128))
    add("dense, odd dims", dense(100, 111, "top_left", dim=72, dim_v=13, **f16))
    # Places in memory.
    for style in (*STYLES[1:], *ODD_STYLES):
        add(f"{style} 2d", na((19, 23), 7, heads=4, kv=4, additional_tokens=3), style=style)
        add(f"{style} dense", dense(140, 140, "top_left", heads=4, kv=2, **f16), style=style)
    # Nothing at all.
    add("no batch", na((12, 12), 5, batch=0))
    add("no batch, dense", dense(12, 15, batch=0))
    return cases


def _axis(draw, longest):
    n = draw.randint(1, longest)
    window = draw.choice([draw.randint(1, n), draw.randint(1, min(n, 15)), n, n + draw.randint(1, 4)])
    step = draw.randint(1, window) if draw.random() < 0.4 else 1
    dilation = draw.randint(1, min(n + 1, 6)) if draw.random() < 0.3 else 1
    return n, window, step, dilation, int(draw.random() < 0.3)


def random_case(seed: int, dtypes=HALF, head_dims=HEAD_DIMS) -> Case:
    draw = random.Random(seed)
    kind = draw.choice(["1d", "2d", "2d", "3d", "dense", "dense", "bias"])
    kv, group = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3, 4, 5])
    dim = draw.choice(head_dims)
    dim_v = draw.choice(head_dims) if draw.random() < 0.25 else dim
    shape = {"heads": kv * group, "kv": kv, "dim": dim, "dim_v": dim_v, "dtype": draw.choice(dtypes)}
    shape["batch"] = draw.choice([1, 1, 2, 3])
    shape["scale"] = draw.choice([None, None, None, 0.3, -0.7, 0.0])
    shape["additional_tokens"] = draw.choice([0, 0, 0, 1, draw.randint(1, 40), draw.randint(1, 150)])
    if kind in ("1d", "2d", "3d"):
        rank = int(kind[0])
        axes = [_axis(draw, {1: 700, 2: 34, 3: 12}[rank]) for _ in range(rank)]
        layout, window, step, dilation, causal = zip(*axes, strict=True)
        bias = math.prod(2 * w - 1 for w in window) < 4000 and draw.random() < 0.25
        problem = neighborhood(layout, window, step, dilation, causal, rpb=bias, **shape)
    else:
        queries, keys = draw.randint(1, 500), draw.choice([draw.randint(0, 16), draw.randint(1, 700)])
        causal = draw.choice(["none", "top_left", "bottom_right"])
        left, right = -1, -1
        if draw.random() < 0.35:
            left = draw.randint(-1, 90)
            right = draw.randint(-1, 90) if causal == "none" else draw.randint(-1, 0)
        problem = dense(queries, keys, causal, left, right, attn_bias=kind == "bias", **shape)
    style = draw.choice([*STYLES, *STYLES, *ODD_STYLES])
    return Case(f"seed {seed}", problem, style, draw.choice([1.0, 1.0, 0.1, 4.0]), seed)


def variations(case: Case, count: int) -> list[Case]:
    """The case, and others that need no other kernel: more batch entries, other data, other strides."""
    made = [case]
    draw = random.Random(f"more of {case.seed}")
    for i in range(1, count):
        style = draw.choice(STYLES) if case.style in STYLES else case.style
        problem = dataclasses.replace(case.problem, batch=draw.randint(1, 3) if case.problem.batch else 0)
        seed = case.seed * 1000 + i
        made.append(Case(f"{case.name}.{i}", problem, style, draw.choice([1.0, 0.3, 2.0]), seed))
    return made


# --- Tensors ---------------------------------------------------------------------------------------------------------


def placed(values: torch.Tensor, style: str) -> torch.Tensor:
    """The same values, lying in memory as `style` says."""
    shape = values.shape
    if style == "heads first" and values.dim() >= 4:
        return values.movedim(-2, 1).contiguous().movedim(1, -2)
    if style in ("apart", "fused"):  # rows with room between them, as a slice of a wider tensor has
        return torch.cat([values, values.new_full((*shape[:-1], 16), math.nan)], -1)[..., : shape[-1]]
    if style == "shifted":
        flat = values.new_empty(values.numel() + 1)
        flat[1:] = values.flatten()
        return flat[1:].view(shape)
    if style == "columns":  # last dimension not contiguous: operators copy it
        return values.mT.contiguous().mT
    if style == "shared" and shape[0] > 1:  # one batch entry for all
        return values[:1].expand(shape)
    return values.contiguous()


def tensors(case: Case, device="cuda") -> dict:
    """Inputs by name, and the gradients that arrive: grad_output, and grad_logsumexp for two seeds of three."""
    p, generator = case.problem, torch.Generator(device).manual_seed(case.seed)
    kind = TYPES[p.dtype]

    def random_values(shape, dtype=kind, spread=1.0):
        return (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)

    made = {}
    if case.style == "fused" and not p.dense and p.heads == p.heads_kv and p.head_dim == p.head_dim_v:
        fused = random_values((*p.shape("query")[:-2], 3, p.heads, p.head_dim), spread=case.spread)
        made["query"], made["key"], made["value"] = fused.unbind(-3)
    else:
        for name in ("query", "key", "value"):
            spread = 1.0 if name == "value" else case.spread
            made[name] = placed(random_values(p.shape(name), spread=spread), case.style)
    if p.additional_tokens:
        for name in ("additional_keys", "additional_values"):
            made[name] = placed(random_values(p.shape(name)), case.style)
    if p.rpb:
        made["rpb"] = random_values(p.shape("rpb"), kind if case.seed % 2 else torch.float32)
    if p.attn_bias:
        b, h = (p.batch, p.heads) if case.seed % 2 else (1, 1)
        bias = random_values((b, h, p.queries, p.keys), kind if case.seed % 3 else torch.float32)
        hidden = torch.rand(bias.shape, generator=generator, device=device) < 0.3
        made["attn_bias"] = bias.masked_fill(hidden, -math.inf)
    lse_type = torch.float64 if p.dtype == "float64" else torch.float32
    made["grad_output"] = placed(random_values(p.shape("output")), case.style)
    made["grad_logsumexp"] = random_values(p.shape("logsumexp"), lse_type) if case.seed % 3 else None
    return made

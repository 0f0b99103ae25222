"""What every operator means, written from the definition as dense PyTorch in float64, and an honest peer of kernels.

Shares no code with the library; test_gpu_oracle.py compares it with the slow oracle of tests/python. Problems are that
oracle's `Problem`; tensors are heads last. One batch entry and one key head are computed at a time: what is held is a
few matrices [queries of the group, keys].

The exact results come with `noise`: how far results honestly computed with half-precision weights may be from them, an
error of one unit in each rounded term, added up as independent errors add up. The peer has such errors too, but may be
right by luck where a tensor is small.
"""

import dataclasses
import math

import torch
from torch import Tensor

TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def axis_table(length, window, step, dilation, causal, device="cpu") -> Tensor:
    """Bool [length, length]: the keys (columns) that each token of one axis sees."""
    token = torch.arange(length, device=device)
    residue, position = token % dilation, token // dilation
    class_length = (length - residue + dilation - 1) // dilation
    wide = torch.clamp(class_length, max=window)
    if causal:
        leader = torch.minimum(position // step * step + step - 1, class_length - 1)
        begin, end = torch.clamp(leader - wide + 1, min=0), position + 1
    else:
        leader = torch.minimum(position // step * step + step // 2, class_length - 1)
        begin = torch.minimum(torch.clamp(leader - wide // 2, min=0), class_length - wide)
        end = begin + wide
    here = position[None]
    return (residue[:, None] == residue[None]) & (here >= begin[:, None]) & (here < end[:, None])


def band_table(queries, keys, causal, left, right, device="cpu") -> Tensor:
    """Bool [queries, keys]: the keys that each query of a dense sequence sees."""
    row, column = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None]
    diagonal = row + (0 if causal == "top_left" else keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal != "none":
        seen &= column <= diagonal
    if left >= 0:
        seen &= column >= diagonal - left
    if right >= 0:
        seen &= column <= diagonal + right
    return seen


def seen_table(problem, device="cpu") -> Tensor:
    """Bool [queries, keys] of one batch entry, additional tokens not among them."""
    m = problem.mask
    if problem.dense:
        return band_table(problem.queries, m.keys, m.causal, m.window_left, m.window_right, device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for n, *axis in zip(problem.layout, m.kernel_size, m.stride, m.dilation, m.is_causal, strict=True):
        here = axis_table(n, *axis, device=device)
        rows, columns = seen.shape
        seen = (seen[:, None, :, None] & here[None, :, None, :]).reshape(rows * n, columns * n)
    return seen


def rpb_places(problem, device="cpu") -> Tensor:
    """[queries, keys]: the flat place of every pair in one head's bias, 0 where it has none."""
    m = problem.mask
    place = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for n, w, d in zip(problem.layout, m.kernel_size, m.dilation, strict=True):
        token = torch.arange(n, device=device)
        here = (token[None] - token[:, None]).div(d, rounding_mode="floor") + w - 1
        here = here.clamp(0, 2 * w - 2)
        rows, columns = place.shape
        place = (place[:, None, :, None] * (2 * w - 1) + here[None, :, None, :]).reshape(rows * n, columns * n)
    return place


@dataclasses.dataclass
class Results:
    """Tensors by name: output, logsumexp, and gradients by the names of the inputs."""

    values: dict
    noise: dict


def gradient_names(problem) -> list[str]:
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if problem.additional_tokens else []
    return names + (["rpb"] if problem.rpb else [])


def _bias(problem, t, b, heads, seen, places, extra) -> tuple[Tensor | None, Tensor]:
    """Bias [G, queries, keys] or None, and what is seen, [G or 1, queries, keys]; additional tokens last."""
    bias, visible = None, seen[None]
    if problem.rpb:
        bias = t["rpb"].reshape(problem.heads, -1)[heads][:, places]
    if problem.attn_bias:
        full = t["attn_bias"]
        rows = full[min(b, full.shape[0] - 1)].expand(problem.heads, -1, -1)[heads]
        visible = visible & (rows != -math.inf)
        bias = rows.masked_fill(rows == -math.inf, 0.0)
    if extra:
        visible = torch.nn.functional.pad(visible, (0, extra), value=True)
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, extra))
    return bias, visible


def compute(problem, tensors, grad_output, grad_lse=None, *, half=None) -> Results:
    """Forward and all gradients. `half` None: in float64, exactly. Otherwise as a kernel of that type computes: scores
    and sums in float32, weights and their gradients rounded to `half` before they are multiplied, results rounded."""
    exact = half is None
    arith = torch.float64 if exact or half == torch.float64 else torch.float32
    stored = TYPES[problem.dtype]
    # Of weights that are not rounded, sums in another order and another exponential are what differs.
    unit = torch.finfo(stored).eps * (8 if stored in (torch.float32, torch.float64) else 1)
    short = (lambda x: x) if exact or half in (torch.float32, torch.float64) else (lambda x: x.to(half).to(arith))
    device = tensors["query"].device
    t = {name: x.detach().to(arith) for name, x in tensors.items()}
    batch, heads, kv, extra = problem.batch, problem.heads, problem.heads_kv, problem.additional_tokens
    group, scale, keys = heads // kv, problem.effective_scale, problem.keys
    query = t["query"].reshape(batch, problem.queries, heads, problem.head_dim)
    key, value = (
        t["key"].reshape(batch, keys, kv, problem.head_dim),
        t["value"].reshape(batch, keys, kv, problem.head_dim_v),
    )
    arriving = grad_output.detach().to(arith).reshape(batch, problem.queries, heads, problem.head_dim_v)
    arriving_lse = None if grad_lse is None else grad_lse.detach().to(arith).reshape(batch, problem.queries, heads)
    seen = seen_table(problem, device)
    places = rpb_places(problem, device) if problem.rpb else None

    def zeros(*shape):
        return torch.zeros(shape, dtype=arith, device=device)

    shapes = {
        "output": arriving.shape,
        "logsumexp": arriving.shape[:-1],
        "query": query.shape,
        "key": key.shape,
        "value": value.shape,
        "additional_keys": (batch, extra, kv, problem.head_dim),
        "additional_values": (batch, extra, kv, problem.head_dim_v),
    }
    made = {name: zeros(*shape) for name, shape in shapes.items()}
    noise = dict.fromkeys(made, 0.0)
    if problem.rpb:
        made["rpb"], noise["rpb"] = zeros(heads, t["rpb"][0].numel()), 0.0
        rpb_noise = zeros(heads, t["rpb"][0].numel())

    def louder(name, squares):
        if squares.numel():
            noise[name] = max(noise[name], math.sqrt(float(squares.max())))

    for b in range(batch):
        for h in range(kv):
            own = slice(h * group, (h + 1) * group)
            q, do = query[b, :, own].transpose(0, 1), arriving[b, :, own].transpose(0, 1)
            k, v = key[b, :, h], value[b, :, h]
            if extra:
                k = torch.cat([k, t["additional_keys"][b, :, h]])
                v = torch.cat([v, t["additional_values"][b, :, h]])
            bias, visible = _bias(problem, t, b, own, seen, places, extra)
            s = scale * (q @ k.mT)
            s = s if bias is None else s + bias
            s = s.masked_fill(~visible, -math.inf)
            if s.shape[-1] == 0:
                made["logsumexp"][b, :, own] = -math.inf
                continue
            top = s.amax(-1, keepdim=True)
            empty = top == -math.inf
            e = torch.exp(s - top.masked_fill(empty, 0.0))
            total = e.sum(-1, keepdim=True)
            lse = (top + total.log()).masked_fill(empty, -math.inf)
            out = (short(e) @ v) / total.masked_fill(empty, 1.0)
            made["output"][b, :, own], made["logsumexp"][b, :, own] = out.transpose(0, 1), lse[..., 0].transpose(0, 1)
            if not exact:
                out = out.to(stored).to(arith)
            p = torch.exp(s - lse.masked_fill(empty, math.inf))
            dp = do @ v.mT
            delta = (p * dp).sum(-1, keepdim=True) if exact else (do * out).sum(-1, keepdim=True)
            arrived = 0.0 if arriving_lse is None else arriving_lse[b, :, own].transpose(0, 1)[..., None]
            ds = p * (dp - delta + arrived)
            made["query"][b, :, own] = (scale * (short(ds) @ k)).transpose(0, 1)
            dk, dv = scale * (short(ds).mT @ q).sum(0), (short(p).mT @ do).sum(0)
            made["key"][b, :, h], made["additional_keys"][b, :, h] = dk[:keys], dk[keys:]
            made["value"][b, :, h], made["additional_values"][b, :, h] = dv[:keys], dv[keys:]
            if problem.rpb:
                flat = torch.where(visible, ds, 0.0)[..., :keys]
                made["rpb"][own].index_add_(1, places.flatten(), flat.flatten(1))
            if not exact:
                continue
            # A unit in each weight, in each term of delta, and what float32 logits lose by their size.
            size = abs(scale) * float((q.abs() @ k.abs().mT).masked_fill(~visible, 0.0).max()) if k.numel() else 0.0
            u = unit + 2 * size * torch.finfo(torch.float32 if stored != torch.float64 else stored).eps
            row = ((do * out) ** 2).sum(-1, keepdim=True)
            ds2 = u**2 * (ds**2 + p**2 * row)
            louder("output", u**2 * (p**2 @ v**2))
            louder("query", scale**2 * (ds2 @ k**2))
            dk2, dv2 = scale**2 * (ds2.mT @ q**2).sum(0), u**2 * ((p**2).mT @ do**2).sum(0)
            louder("key", dk2[:keys])
            louder("value", dv2[:keys])
            louder("additional_keys", dk2[keys:])
            louder("additional_values", dv2[keys:])
            if problem.rpb:
                rpb_noise[own].index_add_(1, places.flatten(), ds2[..., :keys].flatten(1))
    if problem.rpb:
        louder("rpb", rpb_noise)
    names = ["output", "logsumexp", *gradient_names(problem)]
    shapes = {"rpb": t["rpb"].shape} if problem.rpb else {}
    return Results(
        {name: made[name].reshape(shapes.get(name, problem.shape(name))) for name in names},
        {name: noise[name] for name in names},
    )

"""The unfused operators and the merge of parts on the emulated GPU, forward and backward, against the oracle of the GPU
tests."""

import math

import torch
import unfused_oracle
from emulated import call, fresh, launched, untouched
from gpu_oracle import rpb_places
from gpu_problems import neighborhood

INPUTS = ("query", "key", "additional_keys", "rpb"), ("scores", "value", "additional_values")


def compare_all(found, oracle, given, arriving):
    """Results and gradients of `given`, in order; `oracle(*tensors, dtype=)` returns as many results as arrive."""
    expected = []
    for precision in (torch.float64, found[0].dtype):
        twins = [x.to(precision).requires_grad_() for x in given]
        results = oracle(*twins, dtype=precision)
        pairs = zip(results, arriving, strict=True)
        total = sum((x.masked_fill(x.isinf(), 0) * g.to(precision).reshape(x.shape)).sum() for x, g in pairs)
        grads = torch.autograd.grad(total, twins)
        expected.append([x.detach() for x in (*results, *(g.nan_to_num(nan=0.0) for g in grads))])
    for i, (got, reference, plain) in enumerate(zip(found, *expected, strict=True)):
        assert untouched(got), f"something was written beside result {i}"
        unfused_oracle.assert_close(f"result {i}", got, reference, plain)


def check(kind, names, request, given, shape, oracle):
    """One operator of the two: `names` are those of the inputs in `given` and of the result."""
    *inputs, result = names
    t = dict(zip(inputs, given, strict=True))
    dtype = given[0].dtype
    made, arriving = fresh(shape, dtype), torch.randn(shape).to(dtype)
    grads = {name: fresh(x.shape, dtype) for name, x in t.items()}
    call(f"{kind}_forward", "sm80", request, t | {result: made})
    outputs = {f"d_{name}": g for name, g in grads.items()}
    call(f"{kind}_backward", "sm80", request, t | {f"grad_{result}": arriving} | outputs)
    compare_all([made, *grads.values()], lambda *x, dtype: [oracle(*x, dtype=dtype)], given, [arriving])


def check_unfused(layout, mask, heads, heads_kv, dim, dtype, tokens=0, rpb=False, expected=()) -> None:
    """Scores and averages. `mask`: windows, steps, dilation and causality of the axes."""
    torch.manual_seed(0)
    launched()
    window, step, dilation, causal = ([int(n) for n in axis] for axis in mask)
    request = {
        "mask": {"kernel_size": window, "stride": step, "dilation": dilation, "is_causal": causal},
        "engine": "sm80",
    }
    batch, slots = 2, math.prod(window) + tokens
    index = unfused_oracle.slots(layout, mask, "cpu")
    pairs = rpb_places(neighborhood(layout, *mask)).gather(1, index.clamp(min=0))

    def randn(*shape):
        return torch.randn(shape).to(dtype)

    query, key = randn(batch, heads, *layout, dim), randn(batch, heads_kv, *layout, dim)
    extra = [randn(batch, heads_kv, tokens, dim)] if tokens else []
    table = [randn(heads, *(2 * w - 1 for w in window))] if rpb else []

    def flat(x):
        return x.flatten(2, -2)

    def scores(query, key, *rest, dtype):
        bias = rest[-1].flatten(1)[:, pairs] if rpb else None
        made = unfused_oracle.scores(flat(query), flat(key), index, rest[0] if tokens else None, bias, dtype=dtype)
        return made.reshape(batch, heads, *layout, slots)

    def average(weights, value, *rest, dtype):
        made = unfused_oracle.average(flat(weights), flat(value), index, *rest, dtype=dtype)
        return made.reshape(batch, heads, *layout, dim)

    more = ["additional_keys"] * bool(tokens) + ["rpb"] * bool(rpb)
    shape = (batch, heads, *layout, slots)
    check("qk", ["query", "key", *more, "scores"], request, [query, key, *extra, *table], shape, scores)
    more = ["additional_values"] * bool(tokens)
    given = [randn(*shape), key, *extra]
    check("av", ["scores", "value", *more, "output"], request, given, (batch, heads, *layout, dim), average)
    assert set(expected) <= set(names := launched()), names


def check_merge(parts, shape, dim, dtype) -> None:
    torch.manual_seed(0)
    lse_type = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = [torch.randn(*shape, dim).to(dtype) for _ in range(parts)]
    logsumexps = [2 * torch.randn(shape).to(lse_type) for _ in range(parts)]
    for output, logsumexp in zip(outputs, logsumexps, strict=True):
        hole = torch.rand(shape) < 0.3
        logsumexp[hole] = -torch.inf
        output[hole] = torch.nan
    given = {f"output{i}": x for i, x in enumerate(outputs)} | {f"logsumexp{i}": x for i, x in enumerate(logsumexps)}
    made = {"output": fresh((*shape, dim), dtype), "logsumexp": fresh(shape, lse_type)}
    request = {"parts": parts, "engine": "sm80"}
    call("merge_forward", "sm80", request, given | made)
    arriving = {f"grad_{name}": torch.randn(x.shape).to(x.dtype) for name, x in made.items()}
    arriving["grad_logsumexp"].masked_fill_(made["logsumexp"].isinf(), 0)
    grads = {f"d_{name}": fresh(x.shape, x.dtype) for name, x in given.items()}
    call("merge_backward", "sm80", request, given | arriving | grads)

    def oracle(*tensors, dtype):
        return unfused_oracle.merged(tensors[:parts], tensors[parts:], dtype)

    compare_all([*made.values(), *grads.values()], oracle, [*outputs, *logsumexps], [*arriving.values()])

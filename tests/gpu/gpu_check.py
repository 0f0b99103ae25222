"""Engine sm80 against the oracle: one case, forward and backward, every tensor by its largest error (gpu_compare.py).
The operators are called directly, so that no backend can take the engine's place.
"""

import gpu_oracle
import torch
from gpu_compare import compare
from gpu_problems import Case, tensors

from vicus import _arguments, _ops

INPUTS = ("query", "key", "value", "additional_keys", "additional_values")
CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}


def options(deterministic: bool, engine="auto") -> tuple[int, ...]:
    return _arguments.pack_options(engine, deterministic=deterministic, kv_parallelism=not deterministic)


def by_engine(engine: str, q_tile=(0, 0, 0), kv_tile=(0, 0, 0)) -> tuple[int, ...]:
    """Options of forward passes by one of the GPU's engines, with tiles that it has."""
    return _arguments.pack_options(engine, q_tile=q_tile, kv_tile=kv_tile)


def _mask(problem) -> tuple:
    m = problem.mask
    if problem.dense:
        return 0, 0, CAUSAL[m.causal], m.window_left, m.window_right, problem.effective_scale  # nothing is packed
    return m.kernel_size, m.stride, m.dilation, m.is_causal, problem.effective_scale


def _inputs(problem, t) -> list:
    given = [t.get(name) for name in INPUTS]
    return [*given, t.get("attn_bias"), None, None, None] if problem.dense else [*given, t.get("rpb")]


def forward(problem, t, how=()) -> tuple[torch.Tensor, torch.Tensor]:
    operator = _ops.dense if problem.dense else _ops.neighborhood
    with torch.no_grad():
        return operator(*_inputs(problem, t), *_mask(problem), how)


def inference(problem, t) -> torch.Tensor:
    """The operator without logsumexp, of problems without additional tokens and biases."""
    with torch.no_grad():
        if problem.dense:
            return _ops.dense_inference(*(t[name] for name in INPUTS[:3]), *_mask(problem)[2:])
        *lists, scale = _mask(problem)
        return _ops.neighborhood_inference(*(t[name] for name in INPUTS[:3]), [n for x in lists for n in x], scale)


def backward(problem, t, saved, deterministic: bool, engine="auto", only=(*INPUTS, "rpb")) -> dict:
    """Gradients by name, those not in `only` without elements. `saved`: output and logsumexp."""
    operator = _ops.dense_backward if problem.dense else _ops.neighborhood_backward
    names = [*INPUTS] if problem.dense else [*INPUTS, "rpb"]
    wanted = sum(1 << i for i, name in enumerate(names) if t.get(name) is not None and name in only)
    with torch.no_grad():
        found = operator(
            *(t["grad_output"], t["grad_logsumexp"], *_inputs(problem, t), *saved),
            *(*_mask(problem), options(deterministic, engine), wanted),
        )
    return {name: g for name, g in zip(names, found, strict=True) if t.get(name) is not None}


def check_forward(case: Case, how=()) -> float:
    """The forward pass alone, with these options. Returns the largest share of what is allowed."""
    p, t = case.problem, tensors(case)
    arriving = t.pop("grad_output"), t.pop("grad_logsumexp")
    ref, peer = (gpu_oracle.compute(p, t, *arriving, half=half) for half in (None, gpu_oracle.TYPES[p.dtype]))
    got = dict(zip(("output", "logsumexp"), forward(p, t, how), strict=True))
    return max(compare(name, x, ref.values[name], peer.values[name], ref.noise[name]) for name, x in got.items())


def check(case: Case, ways=(True, False), engine="auto") -> float:
    """Forward, and backward by that engine in the given ways (deterministic or not). Returns the largest share of what
    is allowed."""
    p, t = case.problem, tensors(case)
    try:
        saved = forward(p, t)
        grads = {way: backward(p, t, saved, way, engine) for way in ways}
        arriving = t["grad_output"], t["grad_logsumexp"]
        inputs = {name: x for name, x in t.items() if not name.startswith("grad_")}
        ref = gpu_oracle.compute(p, inputs, *arriving)
        peer = gpu_oracle.compute(p, inputs, *arriving, half=gpu_oracle.TYPES[p.dtype])
        got = {"output": saved[0], "logsumexp": saved[1]}
        shares = [compare(name, x, ref.values[name], peer.values[name], ref.noise[name]) for name, x in got.items()]
        for way, found in grads.items():
            assert list(found) == gpu_oracle.gradient_names(p)
            for name, x in found.items():
                what = f"gradient of {name}, {'deterministic' if way else 'with atomics'}"
                shares.append(compare(what, x, ref.values[name], peer.values[name], ref.noise[name]))
    except Exception as error:
        error.add_note(f"{case!r}")
        raise
    return max(shares)

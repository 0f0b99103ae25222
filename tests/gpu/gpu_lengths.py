"""Packed sequences and key padding: problems, their tensors, and the oracle, one sequence after the other, each a dense
problem of its own."""

import dataclasses
import math

import gpu_oracle
import torch

GRADIENTS = ("query", "key", "value", "additional_keys", "additional_values")


@dataclasses.dataclass
class Case:
    """`q` and `k` are lengths, one each of every sequence (packed), or `k` alone of every batch entry (padded)."""

    problem: object
    q: list | None
    k: list
    seed: int = 0

    @property
    def packed(self):
        return self.q is not None

    def pieces(self):
        """Batch entry, its queries and its keys, of every sequence."""
        if not self.packed:
            return [(b, slice(0, self.problem.queries), slice(0, n)) for b, n in enumerate(self.k)]
        found, at_q, at_k = [], 0, 0
        for q, k in zip(self.q, self.k, strict=True):
            found.append((0, slice(at_q, at_q + q), slice(at_k, at_k + k)))
            at_q, at_k = at_q + q, at_k + k
        return found


def made(case, device):
    """Inputs and arriving gradients by name."""
    p, generator = case.problem, torch.Generator("cpu").manual_seed(case.seed)
    names = [*GRADIENTS[: 5 if p.additional_tokens else 3]]
    t = {name: torch.randn(p.shape(name), generator=generator) for name in names}
    t["grad_output"] = torch.randn(p.shape("output"), generator=generator)
    t = {name: x.to(gpu_oracle.TYPES[p.dtype]).to(device) for name, x in t.items()}
    lse_type = torch.float64 if p.dtype == "float64" else torch.float32
    t["grad_logsumexp"] = torch.randn(p.shape("logsumexp"), generator=generator).to(lse_type).to(device)
    return t


def wanted(case, t, half=None):
    """The same by the oracle, and how far honest results may be away."""
    p, exact = case.problem, torch.float64 if half in (None, torch.float64) else torch.float32
    tokens = {"query": "output", "grad_logsumexp": "logsumexp"}
    values = {name: torch.zeros_like(t[of], dtype=exact) for of, name in tokens.items()}
    values["output"] = torch.zeros_like(t["grad_output"], dtype=exact)
    values["logsumexp"] = values["logsumexp"] - math.inf
    values |= {f"gradient of {name}": torch.zeros_like(t[name], dtype=exact) for name in GRADIENTS if name in t}
    noise = dict.fromkeys(values, 0.0)
    for b, q, k in case.pieces():
        if q.start == q.stop:
            continue
        here = dataclasses.replace(
            p, batch=1, layout=[q.stop - q.start], mask=dataclasses.replace(p.mask, keys=k.stop - k.start)
        )
        cut = {"query": q, "key": k, "value": k, "grad_output": q, "grad_logsumexp": q}
        piece = {name: x[b : b + 1, cut[name]] if name in cut else x[b : b + 1] for name, x in t.items()}
        arriving = piece.pop("grad_output"), piece.pop("grad_logsumexp")
        found = gpu_oracle.compute(here, piece, *arriving, half=half)
        for name, x in found.values.items():
            if name in ("output", "logsumexp"):
                values[name][b : b + 1, q] = x
            elif name in cut:
                values[f"gradient of {name}"][b : b + 1, cut[name]] = x
            else:
                values[f"gradient of {name}"][b : b + 1] += x
        for name, x in found.noise.items():
            name = name if name in noise else f"gradient of {name}"
            noise[name] = math.hypot(noise[name], x) if "additional" in name else max(noise[name], x)
    return values, noise

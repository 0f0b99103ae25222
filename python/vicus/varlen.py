"""Parameters of packed variable-length sequences."""

import logging

import torch
from torch import Tensor

from vicus._arguments import wrong

__all__ = ["generate_varlen_parameters"]

logger = logging.getLogger("vicus")


def _check(name: str, lengths: Tensor | None, query: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise wrong(name, f"a {type(lengths).__name__}", "tensors for both seqlens_Q and seqlens_KV, or None for both")
    if lengths.device != query.device:
        raise wrong(f"{name}.device", lengths.device, f"the device of query, {query.device}")
    if lengths.dtype != torch.int32:
        raise wrong(f"{name}.dtype", lengths.dtype, "torch.int32")
    if lengths.dim() != 1 or lengths.shape[0] < 1:
        raise wrong(f"{name}.shape", tuple(lengths.shape), "one dimension, at least one sequence")


def generate_varlen_parameters(
    query: Tensor, key: Tensor, value: Tensor, seqlens_Q: Tensor | None = None, seqlens_KV: Tensor | None = None
) -> tuple[None, None, int, int] | tuple[Tensor, Tensor, int, int]:
    """What `vicus.attention` needs to know of sequences that are packed one after the other.

    The longest sequence is a number on the host, so this waits for the device. Call it once per batch, ahead of the
    model, and pass the result on; `attention` does the same on every call that is given `seqlens_Q` and `seqlens_KV`.

    Args:
        query: [1, all queries, H, D].
        key: [1, all keys, Hkv, D].
        value: [1, all keys, Hkv, Dv].
        seqlens_Q: int32 [N], queries of each sequence, on the device of `query`. They sum to all queries.
        seqlens_KV: int32 [N], keys of each sequence. They sum to all keys.

    Returns:
        ``(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)``: int32 tensors [N + 1] that begin
        with 0, and integers. ``(None, None, 0, 0)`` when neither list is given.

    Raises:
        ValueError: Batch sizes differ or are not 1; one list without the other; a list that is no int32 tensor of one
            dimension on the device of `query`; lists of different or no sequences; negative lengths, or lengths that do
            not sum to the tokens there are.
        RuntimeError: Called with lists inside a region that `torch.compile` compiles.

    Source:
        `natten.utils.varlen.generate_varlen_parameters` of NATTEN 0.21, which does not check the sums.
    """
    if query.shape[0] != key.shape[0] or query.shape[0] != value.shape[0]:
        sizes = f"{query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        raise wrong("batch size of query, key and value", sizes, "one size for all")
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generate_varlen_parameters (or attention with seqlens_Q and seqlens_KV) waits for the device, which "
            "torch.compile cannot trace; call it ahead, and pass cumulative_seqlen_{Q,KV} and max_seqlen_{Q,KV}"
        )
    _check("seqlens_Q", seqlens_Q, query)
    _check("seqlens_KV", seqlens_KV, query)
    if seqlens_Q.shape != seqlens_KV.shape:
        raise wrong("seqlens_KV.shape", tuple(seqlens_KV.shape), f"that of seqlens_Q, {tuple(seqlens_Q.shape)}")
    if query.shape[0] != 1:
        raise wrong("query.shape[0]", query.shape[0], "1: sequences are packed along the tokens, not batched")
    if query.is_cuda:
        logger.debug("lengths of %d packed sequences: waiting for %s", seqlens_Q.shape[0], query.device)
    both = torch.stack([seqlens_Q, seqlens_KV])
    facts = torch.stack([both.amin(1), both.amax(1), both.sum(1)]).tolist()  # one wait for the device
    tokens = (query.shape[1], key.shape[1])
    for name, least, total, there in zip(("seqlens_Q", "seqlens_KV"), facts[0], facts[2], tokens, strict=True):
        if least < 0:
            raise wrong(name, f"{least} at its least", "lengths >= 0")
        if total != there:
            raise wrong(f"sum of {name}", total, f"the tokens there are, {there}")
    cumulative = torch.nn.functional.pad(both.cumsum(1, dtype=torch.int32), (1, 0))
    return cumulative[0], cumulative[1], int(facts[1][0]), int(facts[1][1])

"""Masks and position biases of the unfused backend, as tensors."""

import math

import torch
from torch import Tensor

from vicus.nn.problem import Problem

__all__ = ["alibi_bias", "alibi_slopes", "hidden_pairs"]


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """Slopes of ALiBi, one per head: a geometric sequence that starts at 2 ** (-8 / n), n a power of two.

    For another number of heads, the sequence of the power of two below it, and then every other one of the sequence of
    twice as many.

    Args:
        num_heads: Query heads.
        device: Of the result.

    Returns:
        `[num_heads]`, float32.

    Source:
        Press et al., Train Short, Test Long: Attention with Linear Biases (2022).
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / whole * i) for i in range(1, whole + 1)]
    slopes += [2 ** (-4 / whole * i) for i in range(1, 2 * (num_heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _places(
    length: int, valid: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | int]:
    """Positions of tokens within their sequence, and the sequences' lengths; padded tokens do not count."""
    if valid is None:
        return torch.arange(length, device=device).view(shape), length
    places = valid.cumsum(-1) - 1
    return places.view(valid.shape[0], *shape[1:]), valid.sum(-1).view(-1, 1, 1, 1)


def distances(
    queries: int, keys: int, valid: tuple[Tensor | None, Tensor | None], bottom_right: bool, device: torch.device
) -> Tensor:
    """How far each key lies to the right of the query's place on the diagonal: `[B or 1, 1, Sq, Sk]`, integers."""
    i, length_q = _places(queries, valid[0], (1, 1, queries, 1), device)
    j, length_kv = _places(keys, valid[1], (1, 1, 1, keys), device)
    return j - i - (length_kv - length_q if bottom_right else 0)


def hidden_pairs(
    problem: Problem,
    queries: int,
    keys: int,
    valid: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The pairs that a problem hides.

    Args:
        problem: Of the call.
        queries: Tokens of the query, padding included.
        keys: Tokens of the key, padding included.
        valid: Bool `[B, Sq]` and `[B, Sk]`, True where a token is no padding; or None.
        mask: Bool, broadcastable to `[B, H, Sq, Sk]`, True where a pair is hidden; or None.
        device: Of the result.

    Returns:
        Bool, broadcastable to `[B, H, Sq, Sk]`; None where every query sees every key.
    """
    parts = [] if mask is None else [mask]
    if problem.neighborhood is not None:
        from vicus import _flex_masks  # late: importing FlexAttention takes long

        n = problem.neighborhood
        windows = _flex_masks.Windows(n.layout, n.kernel_size, n.stride, n.dilation, n.is_causal)
        parts.append(~_flex_masks.kept(_flex_masks.neighborhood_table, windows, 0, device))
    left, right = problem.window_size
    if left >= 0 or right >= 0:
        distance = distances(queries, keys, valid, problem.bottom_right_diagonal, device)
        if left >= 0:
            parts.append(distance < -left)
        if right >= 0:
            parts.append(distance > right)
    parts += [] if valid[0] is None else [~valid[0][:, None, :, None]]
    parts += [] if valid[1] is None else [~valid[1][:, None, None, :]]
    hidden = None
    for part in parts:
        hidden = part if hidden is None else hidden | part
    return hidden


def alibi_bias(
    slopes: Tensor, queries: int, keys: int, valid: tuple[Tensor | None, Tensor | None], bottom_right: bool
) -> Tensor:
    """The bias of ALiBi: minus slope times distance.

    Args:
        slopes: `[H]` or `[B, H]`.
        queries: Tokens of the query.
        keys: Tokens of the key.
        valid: As in `hidden_pairs`.
        bottom_right: Whether the last query has the place of the last key, or the first that of the first.

    Returns:
        `[B or 1, H, Sq, Sk]`, the dtype of `slopes`.
    """
    distance = distances(queries, keys, valid, bottom_right, slopes.device).abs()
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance

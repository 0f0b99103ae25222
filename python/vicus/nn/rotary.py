"""Rotary position embeddings, as Megatron Core has them: a table of angles, and what turns queries and keys by it."""

import torch
from torch import Tensor, nn

from vicus._arguments import wrong

__all__ = ["RotaryEmbedding", "apply_rotary_pos_emb"]


class RotaryEmbedding(nn.Module):
    """Angles of rotary embeddings. Has no parameters and no state.

    Args:
        kv_channels: Head dim.
        rotary_percent: Share of it that is turned.
        rotary_interleaved: Whether pairs are neighbors, and not first half with second half.
        seq_len_interpolation_factor: What positions are divided by; None for 1.
        rotary_base: Longest period over 2 pi.

    Raises:
        ValueError: The dims to be turned are not an even number.

    Source:
        Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021). Interface of Megatron Core.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float = 1.0,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000,
    ) -> None:
        super().__init__()
        dim = int(kv_channels * rotary_percent) if rotary_percent < 1 else kv_channels
        if dim < 2 or dim % 2 != 0:
            raise wrong("kv_channels * rotary_percent", dim, "an even number >= 2")
        self.dim = dim
        self.rotary_base = rotary_base
        self.rotary_interleaved = rotary_interleaved
        self.seq_len_interpolation_factor = seq_len_interpolation_factor

    def forward(self, max_seq_len: int, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
        """Angles of positions `offset` to `offset + max_seq_len`.

        Args:
            max_seq_len: Positions.
            offset: The first of them.
            device: Of the result; None for PyTorch's default.

        Returns:
            `[max_seq_len, 1, 1, dim]`, float32: one angle for each dim that is turned.
        """
        # No buffer: a model that is cast to a smaller type must not take its angles along.
        frequencies = 1 / self.rotary_base ** (
            torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        )
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=device) + offset
        if self.seq_len_interpolation_factor is not None:
            positions = positions / self.seq_len_interpolation_factor
        angles = torch.outer(positions, frequencies)
        angles = angles.repeat_interleave(2, -1) if self.rotary_interleaved else torch.cat((angles, angles), -1)
        return angles[:, None, None]


def apply_rotary_pos_emb(
    x: Tensor, angles: Tensor, rotary_interleaved: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Turns queries or keys.

    Args:
        x: `[s, b, h, d]`; packed `[t, h, d]`.
        angles: `[s or more, 1, 1, dim]`, dim at most d: features beyond it stay as they are. Of positions within a
            sequence.
        rotary_interleaved: As in `RotaryEmbedding`.
        cu_seqlens: Packed sequences: where each starts, int `[sequences + 1]`.

    Returns:
        As `x`.

    Raises:
        ValueError: There are fewer angles than positions, or more dims than features.
    """
    dim = angles.shape[-1]
    if dim > x.shape[-1]:
        raise wrong("angles.shape[-1]", dim, f"at most the head dim, {x.shape[-1]}")
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp(max=len(cu_seqlens) - 2)
        # Tokens after the last sequence are of no consequence, but must not fall off the table.
        angles = angles[(tokens - cu_seqlens[sequence]).clamp(max=angles.shape[0] - 1), 0]
    elif angles.shape[0] < x.shape[0]:
        raise wrong("angles.shape[0]", angles.shape[0], f"at least the sequence length, {x.shape[0]}")
    else:
        angles = angles[: x.shape[0]]
    turned, rest = x[..., :dim], x[..., dim:]
    if rotary_interleaved:
        pairs = turned.unflatten(-1, (-1, 2))
        crossed = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        crossed = torch.cat((-second, first), -1)
    turned = turned * angles.cos().to(x.dtype) + crossed * angles.sin().to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)

"""The unfused functions under the names that NATTEN 0.14 to 0.17 had, which published models still import.

Layouts are those of `vicus.unfused`; rules on windows are those of the time.
"""

from torch import Tensor

from vicus import _arguments
from vicus.types import DimensionTypeOrDed
from vicus.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]


def _rules(
    rank: int, x: Tensor, kernel_size: DimensionTypeOrDed, dilation: DimensionTypeOrDed | None
) -> dict[str, DimensionTypeOrDed]:
    """Windows are odd, at least 3, and fit their axes."""
    windows, _, gaps, _ = _arguments.per_axis(rank, kernel_size, 1, dilation, strict=True)
    if any(w % 2 == 0 for w in windows):
        raise _arguments.wrong("kernel_size", windows, "odd integers, 3 or more")
    if isinstance(x, Tensor) and x.dim() == rank + 3:
        _arguments.check_fits(x.shape[2:-1], windows, gaps)
    return {"kernel_size": windows, "dilation": gaps}


def natten1dqk(
    query: Tensor, key: Tensor, kernel_size: DimensionTypeOrDed, dilation: DimensionTypeOrDed | None = 1
) -> Tensor:
    """`na1d_qk` under the name it had up to 0.17, with the rules of that time.

    Args:
        query: `[B, H, L, D]`.
        key: `[B, H, L, D]`.
        kernel_size: Window per axis, odd, at least 3; times `dilation` it must fit the axis.
        dilation: Tokens from one key of a window to the next; None means 1.

    Returns:
        Scores `[B, H, L, w]`, not scaled.

    Raises:
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.14.
    """
    return na1d_qk(query, key, **_rules(1, query, kernel_size, dilation))


def natten1dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed | None = 1,
) -> Tensor:
    """`na1d_qk` under the name it had up to 0.17, with the rules of that time.

    Args:
        query: `[B, H, L, D]`.
        key: `[B, H, L, D]`.
        rpb: Bias per head and relative position, `[H, 2 * w - 1]`, or None.
        kernel_size: Window per axis, odd, at least 3; times `dilation` it must fit the axis.
        dilation: Tokens from one key of a window to the next; None means 1.

    Returns:
        Scores `[B, H, L, w]`, not scaled.

    Raises:
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.14.
    """
    return na1d_qk(query, key, rpb=rpb, **_rules(1, query, kernel_size, dilation))


def natten1dav(
    attn: Tensor, value: Tensor, kernel_size: DimensionTypeOrDed, dilation: DimensionTypeOrDed | None = 1
) -> Tensor:
    """`na1d_av` under the name it had up to 0.17, with the rules of that time.

    Args:
        attn: Weights `[B, H, L, w]`.
        value: `[B, H, L, Dv]`.
        kernel_size: Window per axis, odd, at least 3; times `dilation` it must fit the axis.
        dilation: Tokens from one key of a window to the next; None means 1.

    Returns:
        `[B, H, L, Dv]`.

    Raises:
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.14.
    """
    return na1d_av(attn, value, **_rules(1, value, kernel_size, dilation))


def natten2dqk(
    query: Tensor, key: Tensor, kernel_size: DimensionTypeOrDed, dilation: DimensionTypeOrDed | None = 1
) -> Tensor:
    """`na2d_qk` under the name it had up to 0.17, with the rules of that time.

    Args:
        query: `[B, H, X, Y, D]`.
        key: `[B, H, X, Y, D]`.
        kernel_size: Window per axis, odd, at least 3; times `dilation` it must fit the axis.
        dilation: Tokens from one key of a window to the next; None means 1.

    Returns:
        Scores `[B, H, X, Y, w0 * w1]`, not scaled.

    Raises:
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.14.
    """
    return na2d_qk(query, key, **_rules(2, query, kernel_size, dilation))


def natten2dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed | None = 1,
) -> Tensor:
    """`na2d_qk` under the name it had up to 0.17, with the rules of that time.

    Args:
        query: `[B, H, X, Y, D]`.
        key: `[B, H, X, Y, D]`.
        rpb: Bias per head and relative position, `[H, 2 * w0 - 1, 2 * w1 - 1]`, or None.
        kernel_size: Window per axis, odd, at least 3; times `dilation` it must fit the axis.
        dilation: Tokens from one key of a window to the next; None means 1.

    Returns:
        Scores `[B, H, X, Y, w0 * w1]`, not scaled.

    Raises:
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.14.
    """
    return na2d_qk(query, key, rpb=rpb, **_rules(2, query, kernel_size, dilation))


def natten2dav(
    attn: Tensor, value: Tensor, kernel_size: DimensionTypeOrDed, dilation: DimensionTypeOrDed | None = 1
) -> Tensor:
    """`na2d_av` under the name it had up to 0.17, with the rules of that time.

    Args:
        attn: Weights `[B, H, X, Y, w0 * w1]`.
        value: `[B, H, X, Y, Dv]`.
        kernel_size: Window per axis, odd, at least 3; times `dilation` it must fit the axis.
        dilation: Tokens from one key of a window to the next; None means 1.

    Returns:
        `[B, H, X, Y, Dv]`.

    Raises:
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.14.
    """
    return na2d_av(attn, value, **_rules(2, value, kernel_size, dilation))


def _rules_3d(
    x: Tensor, sizes: tuple[DimensionTypeOrDed | None, ...], named: dict[str, DimensionTypeOrDed | None]
) -> dict[str, DimensionTypeOrDed]:
    """`_rules` of either form of sizes."""
    short = len(sizes) + len(named) <= 2
    names = ("kernel_size", "dilation") if short else ("kernel_size_d", "kernel_size", "dilation_d", "dilation")
    given = dict(zip(names, sizes, strict=False)) | named
    if set(given) - set(names) or len(given) != len(sizes) + len(named) or len(given) < (1 if short else 4):
        raise TypeError(
            f"sizes are {sizes} and {named}; allowed: kernel_size, dilation or "
            "kernel_size_d, kernel_size, dilation_d, dilation"
        )
    if short:
        return _rules(3, x, given["kernel_size"], given.get("dilation"))
    window, gap = given["kernel_size"], given["dilation"]
    return _rules(3, x, (given["kernel_size_d"], window, window), (given["dilation_d"], gap, gap))


def natten3dqk(
    query: Tensor,
    key: Tensor,
    *sizes: DimensionTypeOrDed | None,
    **named: DimensionTypeOrDed | None,
) -> Tensor:
    """`na3d_qk` under the name it had up to 0.17, with the rules of that time.

    Args:
        query: `[B, H, X, Y, Z, D]`.
        key: `[B, H, X, Y, Z, D]`.
        sizes: `kernel_size, dilation` for all axes, or `kernel_size_d, kernel_size, dilation_d, dilation`, of the first
            axis and of the other two. Windows are odd, at least 3; times its dilation, each must fit its axis.
        named: The same by name.

    Returns:
        Scores `[B, H, X, Y, Z, w0 * w1 * w2]`, not scaled.

    Raises:
        TypeError: Sizes of neither form.
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.15.
    """
    return na3d_qk(query, key, **_rules_3d(query, sizes, named))


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    *sizes: DimensionTypeOrDed | None,
    **named: DimensionTypeOrDed | None,
) -> Tensor:
    """`na3d_qk` under the name it had up to 0.17, with the rules of that time.

    Args:
        query: `[B, H, X, Y, Z, D]`.
        key: `[B, H, X, Y, Z, D]`.
        rpb: Bias per head and relative position, `[H, 2 * w0 - 1, 2 * w1 - 1, 2 * w2 - 1]`, or None.
        sizes: `kernel_size, dilation` for all axes, or `kernel_size_d, kernel_size, dilation_d, dilation`, of the first
            axis and of the other two. Windows are odd, at least 3; times its dilation, each must fit its axis.
        named: The same by name.

    Returns:
        Scores `[B, H, X, Y, Z, w0 * w1 * w2]`, not scaled.

    Raises:
        TypeError: Sizes of neither form.
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.15.
    """
    return na3d_qk(query, key, rpb=rpb, **_rules_3d(query, sizes, named))


def natten3dav(
    attn: Tensor,
    value: Tensor,
    *sizes: DimensionTypeOrDed | None,
    **named: DimensionTypeOrDed | None,
) -> Tensor:
    """`na3d_av` under the name it had up to 0.17, with the rules of that time.

    Args:
        attn: Weights `[B, H, X, Y, Z, w0 * w1 * w2]`.
        value: `[B, H, X, Y, Z, Dv]`.
        sizes: `kernel_size, dilation` for all axes, or `kernel_size_d, kernel_size, dilation_d, dilation`, of the first
            axis and of the other two. Windows are odd, at least 3; times its dilation, each must fit its axis.
        named: The same by name.

    Returns:
        `[B, H, X, Y, Z, Dv]`.

    Raises:
        TypeError: Sizes of neither form.
        ValueError: An argument that breaks these rules.

    Source:
        NATTEN 0.15.
    """
    return na3d_av(attn, value, **_rules_3d(value, sizes, named))

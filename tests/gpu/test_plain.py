"""The kernels without tensor cores compile, without spills and stack, for every storage type, rank and feature.

The prologues here are those that the kernels' header comments ask for; tiles are as large as registers and shared
memory of every kind of GPU allow.
"""

import itertools

import pytest
from probe import succeed

ELEMENTS = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
WARPS = 4
NEIGHBORHOOD = {1: (1, 1, 31), 2: (1, 7, 7), 3: (3, 5, 5)}


def round_up(n, unit):
    return -(-n // unit) * unit


def tile(rank, tokens):
    return (1,) * (3 - rank) + {1: (tokens,), 2: (8, tokens // 8), 3: (4, 4, tokens // 16)}[rank]


def constants(values):
    lines = []
    for name, value in values.items():
        kind = "bool" if isinstance(value, bool) or (isinstance(value, tuple) and isinstance(value[0], bool)) else "int"
        items = value if isinstance(value, tuple) else (value,)
        text = ", ".join(str(item).lower() for item in items)
        array = isinstance(value, tuple)
        lines.append(
            f"[[maybe_unused]] constexpr {kind} {name}{'[3]' if array else ''} = {f'{{{text}}}' if array else text};"
        )
    return "\n".join(lines) + "\n"


def problem(element, rank, head_dim, featured):
    """Constants of a problem: plain, or with every feature that its kind of mask has."""
    dense = rank == 1
    return {
        "kElement": ELEMENTS[element],
        "kRank": rank,
        "kHeadDim": head_dim,
        "kHeadDimV": head_dim,
        "kWarps": WARPS,
        "kMinBlocks": 1,
        "kTileHeads": 1,
        "kDense": dense,
        "kWindow": (1, 1, 1) if dense else NEIGHBORHOOD[rank],
        "kStep": (1, 1, 2 if featured and not dense else 1),
        "kDilation": (1, 2 if featured and rank > 1 else 1, 1),
        "kCausal": (False, False, featured and not dense),
        "kBandLeft": 100 if featured and dense else -1,
        "kBandRight": 0 if featured and dense else -1,
        "kBandBottom": dense,
        "kPacked": featured and dense,
        "kKeyLengths": False,
        "kVectors": not featured,
        "kAdditional": featured,
        "kLogsumexp": True,
        "kBiasKind": 1 if featured and not dense else 0,
        "kBiasType": ELEMENTS[element],
    }


def tiles(kernel, element, rank, head_dim):
    """Tiles of a kernel: rows of a thread, columns of the products, tokens of queries and keys."""
    wide = element == "float64"
    if kernel == "plain_forward":
        depth = round_up(head_dim, 16 if wide else 32) if head_dim <= (64 if wide else 128) else (32 if wide else 64)
        columns = depth if head_dim <= (64 if wide else 128) else (64 if wide else 128)
        return {
            "kThreadRows": 4,
            "kDepth": depth,
            "kWide": columns,
            "kTileQ": tile(rank, 64),
            "kTileKv": tile(rank, 32 if wide else 64),
        }
    depth = round_up(head_dim, 16 if wide else 32) if head_dim <= (64 if wide else 128) else (32 if wide else 64)
    of_keys = kernel != "plain_backward_queries"
    rows = 2 if wide or (of_keys and depth > 64) else 4
    own = WARPS * 4 * rows
    other = 32 if wide or depth > 64 else 64
    queries, keys = (other, own) if of_keys else (own, other)
    return {
        "kThreadRows": rows,
        "kDepth": depth,
        "kWide": depth,
        "kTileQ": tile(rank, queries),
        "kTileKv": tile(rank, keys),
    }


KERNELS = ("plain_forward", "plain_backward_queries", "plain_backward_keys")
CASES = [
    (kernel, element, rank, head_dim, featured)
    for (kernel, element), (rank, head_dim, featured) in zip(
        itertools.product(KERNELS * 2, ELEMENTS),
        itertools.cycle([(1, 64, False), (2, 64, True), (3, 32, False), (1, 128, True), (2, 128, False)]),
        strict=False,
    )
]


@pytest.mark.parametrize(("kernel", "element", "rank", "head_dim", "featured"), CASES)
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles(kernel, element, rank, head_dim, featured, architecture, nvrtc_directory, tmp_path):
    values = problem(element, rank, head_dim, featured) | tiles(kernel, element, rank, head_dim)
    values["kSharedBytes"] = 232448  # the kernels assert that what they use is less
    text = constants(values) + f'#include "{kernel}.cu"\n'
    environment = {
        "VICUS_NVRTC": nvrtc_directory,
        "LD_LIBRARY_PATH": nvrtc_directory,
        "VICUS_CACHE_DIR": tmp_path,
    }
    report = succeed("compile", architecture, text=text, environment=environment)
    assert report["kernel"] == kernel
    assert (report["stack"], report["spill_stores"], report["spill_loads"]) == ("0", "0", "0"), report

"""Masks of the backend "flex": the window definition, orders of tokens, blocks and tables."""

import itertools
import math

import pytest
import torch
from oracle_masks import axis_keys, table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from vicus import _flex_masks, flex
from vicus._flex_masks import Windows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- Windows and orders ----------------------------------------------------------------------------------------------


def test_windows_are_the_definition():
    for n in range(1, 10):
        token = torch.arange(n)
        for w, d, causal in itertools.product(range(1, n + 3), range(1, n + 2), (False, True)):
            for s in range(1, w + 1):
                seen = _flex_masks.window_sees(token[:, None], token, n, w, s, d, causal)
                assert torch.equal(seen, table(axis_keys(n, w, s, d, causal), n)), (n, w, s, d, causal)


def test_tokens_outside_an_axis_see_nothing_and_are_not_seen():
    token = torch.arange(-3, 14)
    inside = (token >= 0) & (token < 10)
    for w, s, d, causal in [(3, 1, 1, False), (4, 3, 2, True), (12, 2, 3, False), (2, 1, 12, True)]:
        seen = _flex_masks.window_sees(token[:, None], token, 10, w, s, d, causal)
        assert torch.equal(seen.any(0) | seen.any(1), inside)


ORDERS = [
    ((7,), (1,), (4,)),
    ((7,), (3,), (2,)),
    ((5, 6), (2, 1), (2, 4)),
    ((5, 6), (7, 2), (1, 3)),
    ((3, 5, 4), (1, 2, 3), (2, 2, 1)),
    ((3, 5, 4), (1, 2, 3), None),
]


@pytest.mark.parametrize(("layout", "dilation", "tile"), ORDERS)
def test_orders_are_inverted_and_name_their_tokens(layout, dilation, tile):
    order = _flex_masks.Order(layout, dilation, tile)
    x = torch.randn(2, *layout, 3)
    flat = order.flatten(x)
    assert flat.shape == (2, order.length, 3)
    assert torch.equal(order.unflatten(flat), x)
    # The sequence holds at each index the token that `coordinates` names.
    grid = torch.stack(torch.meshgrid(*map(torch.arange, layout), indexing="ij"), -1)[None]
    named = torch.stack(order.coordinates(torch.arange(order.length)), -1)
    inside = (named < torch.tensor(layout)).all(-1)
    assert torch.equal(named[inside], order.flatten(grid)[0][inside])
    assert int(inside.sum()) == math.prod(layout)


def test_a_tile_is_one_block_of_one_residue_class():
    layout, dilation, tile = (9, 11), (2, 3), (2, 3)
    order = _flex_masks.Order(layout, dilation, tile)
    tokens = torch.stack(order.coordinates(torch.arange(order.length)), -1).view(-1, math.prod(tile), 2)
    residues, positions = tokens % torch.tensor(dilation), tokens // torch.tensor(dilation)
    assert (residues == residues[:, :1]).all()
    assert (positions.amax(1) - positions.amin(1) == torch.tensor(tile) - 1).all()


# --- Blocks ----------------------------------------------------------------------------------------------------------


def blocks_by_pytorch(blocks, batches=None):
    q_len, kv_len = blocks.seq_lengths
    return create_block_mask(blocks.mask_mod, batches, None, q_len, kv_len, "cpu", blocks.BLOCK_SIZE)


def assert_same_blocks(ours, theirs):
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(theirs, f"{name}_num_blocks")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts), name
        places = getattr(theirs, f"{name}_indices")
        listed = torch.arange(places.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(ours, f"{name}_indices")[listed], places[listed]), name


@pytest.mark.parametrize("tiles", [None, ((2, 4), (4, 4)), ((1, 8), (8, 1))])
@pytest.mark.parametrize("extra", [0, 5])
def test_neighborhood_blocks(monkeypatch, tiles, extra):
    monkeypatch.setattr(_flex_masks, "_PAIRS", 3000)  # several steps
    windows = Windows((14, 20), (4, 9), (2, 1), (2, 1), (False, True))
    q_tile, kv_tile = tiles or (None, None)
    block = (128, 128) if tiles is None else (8, 16)
    ours = _flex_masks.neighborhood_blocks(windows, q_tile, kv_tile, extra, block, CPU)
    assert int(ours.full_kv_num_blocks.sum()) + int(ours.kv_num_blocks.sum()) > 0
    assert_same_blocks(ours, blocks_by_pytorch(ours))


@pytest.mark.parametrize("band", [(0, -1, -1), (1, -1, -1), (2, 60, -1), (0, 40, 30)])
def test_band_blocks(band):
    ours = _flex_masks.band_blocks(_flex_masks.Band(300, 420, *band), 3, (128, 128), CPU)
    assert int(ours.kv_num_blocks.sum()) > 0
    assert_same_blocks(ours, blocks_by_pytorch(ours))


def test_blocks_of_padded_keys_differ_per_entry():
    lengths = torch.tensor([130, 400, 0])
    mask = _flex_masks.dense_mask(200, 400, 0, -1, -1, lengths, None)
    ours = _flex_masks.blocks_of(mask, 3, 200, 400, (128, 128), CPU)
    assert_same_blocks(ours, blocks_by_pytorch(ours, 3))
    assert ours.kv_num_blocks[:, 0, 0].tolist() == [1, 1, 0]
    assert ours.full_kv_num_blocks[:, 0, 0].tolist() == [1, 3, 0]


def line(n):
    """A window of 3 over n tokens."""
    return Windows((n,), (3,), (1,), (1,), (False,))


def test_blocks_and_tables_are_kept_and_their_number_is_bounded():
    for function, more in (
        (_flex_masks.neighborhood_blocks, (None, None, 0, (128, 128), CPU)),
        (_flex_masks.neighborhood_table, (0, CPU)),
    ):
        function.cache_clear()
        assert _flex_masks.kept(function, line(9), *more) is _flex_masks.kept(function, line(9), *more)
        for n in range(10, 80):
            _flex_masks.kept(function, line(n), *more)
        info = function.cache_info()
        assert info.currsize == info.maxsize <= 64


def test_large_tables_are_not_kept(monkeypatch):
    monkeypatch.setattr(flex, "KEPT_PAIRS", 100)
    _flex_masks.neighborhood_table.cache_clear()
    for n in (10, 11):
        x = torch.randn(1, n, 1, 4)
        flex.neighborhood(x, x, x, (3,), (1,), (1,), (False,), 1.0)
    assert _flex_masks.neighborhood_table.cache_info().currsize == 1


def test_what_is_kept_serves_later_training():
    # Tensors of inference mode cannot be saved for a backward pass, fake ones hold nothing.
    _flex_masks.neighborhood_table.cache_clear()
    query = torch.randn(1, 9, 1, 4)
    run = lambda x: flex.neighborhood(x, x, x, (3,), (1,), (1,), (False,), 1.0)  # noqa: E731
    with FakeTensorMode() as mode:
        assert run(mode.from_tensor(query))[0].shape == query.shape
    assert _flex_masks.neighborhood_table.cache_info().currsize == 0
    with torch.inference_mode():
        wanted = run(query)[0]
    assert _flex_masks.neighborhood_table.cache_info().currsize == 1
    query.requires_grad_()
    found = run(query)[0]
    found.sum().backward()
    assert torch.equal(found, wanted)
    assert query.grad.isfinite().all()

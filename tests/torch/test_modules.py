"""The layers: parameters as NATTEN names them, arguments of every release, and which operators they run."""

import copy
import io
import pickle

import pytest
import torch

from vicus import context, functional, modules, unfused

LAYERS = {
    1: modules.NeighborhoodAttention1D,
    2: modules.NeighborhoodAttention2D,
    3: modules.NeighborhoodAttention3D,
}
LAYOUTS = {1: (11,), 2: (8, 9), 3: (4, 5, 6)}
RANKS = pytest.mark.parametrize("rank", LAYERS)


@pytest.fixture(autouse=True)
def defaults():
    context.reset()
    torch.manual_seed(0)
    yield
    context.reset()


def layer_of(rank, embed_dim=16, num_heads=4, kernel_size=3, **arguments):
    return LAYERS[rank](embed_dim, num_heads, kernel_size, **arguments).double()


def tokens(rank, embed_dim=16, batch=2):
    return torch.randn(batch, *LAYOUTS[rank], embed_dim, dtype=torch.float64)


def by_hand(layer, x, groups=None):
    """The layer out of its parameters, as NATTEN computes it: one projection, three equal parts or q, k, v in a row."""
    groups = groups or layer.num_heads
    d, h = layer.head_dim, layer.num_heads
    qkv = torch.nn.functional.linear(x, layer.qkv.weight, layer.qkv.bias)
    q, k, v = (part.reshape(*x.shape[:-1], -1, d) for part in qkv.tensor_split((h * d, (h + groups) * d), dim=-1))
    k, v = (part.repeat_interleave(h // groups, dim=-2) for part in (k, v))
    out = functional.neighborhood_attention(
        q,
        k,
        v,
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        layer.is_causal,
        layer.scale,
        rpb=layer.rpb,
    )
    return torch.nn.functional.linear(out.flatten(-2), layer.proj.weight, layer.proj.bias)


# --- Parameters ------------------------------------------------------------------------------------------------------


@RANKS
def test_state_dict(rank):
    layer = layer_of(rank)
    assert {n: tuple(x.shape) for n, x in layer.state_dict().items()} == {
        "qkv.weight": (48, 16),
        "qkv.bias": (48,),
        "proj.weight": (16, 16),
        "proj.bias": (16,),
    }
    windows = (3, 5, 7)[:rank]
    biased = layer_of(rank, kernel_size=windows, qkv_bias=False, rel_pos_bias=True)
    assert set(biased.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias", "rpb"}
    assert biased.rpb.shape == (4, *(2 * w - 1 for w in windows))


def test_weights_of_natten_load():
    """A state dict with the names and shapes that NATTEN 0.14 and 0.17 write."""
    saved = {
        "rpb": torch.randn(4, 13, 13),
        "qkv.weight": torch.randn(48, 16),
        "qkv.bias": torch.randn(48),
        "proj.weight": torch.randn(16, 16),
        "proj.bias": torch.randn(16),
    }
    layer = modules.NeighborhoodAttention2D(dim=16, num_heads=4, kernel_size=7, bias=True)
    assert str(layer.load_state_dict(saved)) == "<All keys matched successfully>"
    assert torch.equal(layer.rpb, saved["rpb"])


def test_initial_bias_is_a_truncated_normal():
    rpb = modules.NeighborhoodAttention2D(64, 32, 13, rel_pos_bias=True).rpb.detach()
    assert abs(rpb.mean()) < 1e-3
    assert abs(rpb.std() - 0.02) < 1e-3
    assert rpb.abs().max() < 2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_num_query_groups(groups):
    layer = layer_of(2, num_query_groups=groups, rel_pos_bias=True)
    assert layer.qkv.weight.shape == ((4 + 2 * groups) * 4, 16)
    x = tokens(2)
    torch.testing.assert_close(layer(x), by_hand(layer, x, groups))
    with context.use_fused_na(False):
        torch.testing.assert_close(layer(x), by_hand(layer, x, groups))


# --- What is computed ------------------------------------------------------------------------------------------------


@RANKS
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "dilation": 1, "is_causal": True},
        {"dilation": 1, "rel_pos_bias": True, "qk_scale": 0.7},
        {"is_causal": True, "rel_pos_bias": True, "qkv_bias": False, "num_query_groups": 2},
        {"qk_scale": 0.0},
    ],
)
def test_fused_and_unfused(rank, arguments):
    layer = layer_of(rank, **arguments)
    x = tokens(rank).requires_grad_()
    wanted = by_hand(layer, x) if "num_query_groups" not in arguments else by_hand(layer, x, 2)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), [x, *layer.parameters()])
    for fused in (True, False):
        with context.use_fused_na(fused):
            out = layer(x)
            gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(out, wanted)
        for got, gradient in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(got, gradient)


def test_values_per_axis():
    layer = layer_of(3, kernel_size=(2, 3, 4), stride=(1, 2, 3), dilation=(2, 1, 1), is_causal=(True, False, False))
    assert (layer.kernel_size, layer.stride, layer.dilation) == ((2, 3, 4), (1, 2, 3), (2, 1, 1))
    assert layer.is_causal == (True, False, False)
    x = tokens(3)
    torch.testing.assert_close(layer(x), by_hand(layer, x))


class Calls:
    """Which operators a call runs."""

    def __init__(self, monkeypatch):
        self.names = []
        for rank, function in modules._FUSED.items():
            monkeypatch.setitem(modules._FUSED, rank, self.noted("fused", function))
        for rank, pair in modules._UNFUSED.items():
            monkeypatch.setitem(modules._UNFUSED, rank, tuple(self.noted("unfused", f) for f in pair))

    def noted(self, name, function):
        def call(*args, **kwargs):
            self.names.append(name)
            self.tensors = args
            return function(*args, **kwargs)

        return call


def test_which_operators_run(monkeypatch):
    calls = Calls(monkeypatch)
    x = tokens(2)
    layer = layer_of(2, attn_drop=0.5)
    expected = {(True, False): ["fused"], (True, True): ["unfused"] * 2}
    expected |= {(False, training): ["unfused"] * 2 for training in (False, True)}
    for (fused, training), names in expected.items():
        calls.names.clear()
        with context.use_fused_na(fused):
            layer.train(training)(x)
        assert calls.names == names
    calls.names.clear()
    layer_of(2).train()(x)
    assert calls.names == ["fused"]


def test_slices_of_one_projection(monkeypatch):
    """Query, key and value reach the operator as views of the projection's output."""
    calls = Calls(monkeypatch)
    layer_of(2, num_query_groups=2)(tokens(2))
    q, k, v = calls.tensors
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert (q.storage_offset(), k.storage_offset(), v.storage_offset()) == (0, 16, 24)


def test_attention_dropout():
    """Weights are dropped and the rest scaled up, on average the identity; evaluation drops none."""
    layer = layer_of(1, attn_drop=0.5)
    x = tokens(1)
    quiet = layer.eval()(x)
    torch.testing.assert_close(quiet, by_hand(layer, x))
    layer.train()
    seen = torch.stack([layer(x) for _ in range(400)])
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen.mean(0), quiet, rtol=0, atol=6 * seen.std(0).max().item() / 20)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    q, k, v = layer.qkv(x).view(2, 11, 3, 4, 4).permute(2, 0, 3, 1, 4)
    attn = unfused.na1d_qk(q * layer.scale, k, 3).softmax(-1)
    attn = torch.nn.functional.dropout(attn, 0.5)
    torch.testing.assert_close(ours, layer.proj(unfused.na1d_av(attn, v, 3).permute(0, 2, 1, 3).flatten(2)))


def test_projection_dropout():
    layer = layer_of(1, proj_drop=0.5)
    x = tokens(1)
    out = layer.train()(x)
    assert 0.2 < (out == 0).double().mean() < 0.8
    torch.testing.assert_close(layer.eval()(x), by_hand(layer, x))


# --- Arguments -------------------------------------------------------------------------------------------------------


def test_positional_order_of_natten_0_21():
    layer = modules.NeighborhoodAttention2D(16, 4, 5, 2, 1, True, False, 0.5, 0.1)
    assert (layer.embed_dim, layer.num_heads, layer.head_dim) == (16, 4, 4)
    assert (layer.kernel_size, layer.stride, layer.dilation) == ((5, 5), (2, 2), (1, 1))
    assert layer.is_causal == (True, True)
    assert layer.qkv.bias is None
    assert layer.scale == 0.5
    assert layer.proj_drop.p == 0.1
    assert layer.rpb is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"dim": 16, "num_heads": 4, "kernel_size": 5, "bias": True, "attn_drop": 0.1},  # 0.14
        {"dim": 16, "num_heads": 4, "kernel_size": 5, "rel_pos_bias": True, "attn_drop": 0.1},  # 0.17
    ],
)
def test_keywords_of_earlier_releases(arguments):
    layer = modules.NeighborhoodAttention2D(**arguments)
    assert layer.embed_dim == 16
    assert layer.rpb.shape == (4, 9, 9)
    assert layer.attn_drop_rate == layer.attn_drop.p == 0.1


ERRORS = {
    "no embed_dim": (TypeError, "embed_dim", {"num_heads": 4, "kernel_size": 3}),
    "no num_heads": (TypeError, "num_heads", {"embed_dim": 16, "kernel_size": 3}),
    "no kernel_size": (TypeError, "kernel_size", {"embed_dim": 16, "num_heads": 4}),
    "two names of a size": (TypeError, "dim", {"embed_dim": 16, "dim": 16, "num_heads": 4, "kernel_size": 3}),
    "two names of the bias": (
        TypeError,
        "bias",
        {"embed_dim": 16, "num_heads": 4, "kernel_size": 3, "bias": True, "rel_pos_bias": True},
    ),
    "heads": (ValueError, "num_heads", {"embed_dim": 16, "num_heads": 3, "kernel_size": 3}),
    "no heads": (ValueError, "num_heads", {"embed_dim": 16, "num_heads": 0, "kernel_size": 3}),
    "groups": (
        ValueError,
        "num_query_groups",
        {"embed_dim": 16, "num_heads": 4, "kernel_size": 3, "num_query_groups": 3},
    ),
    "kernel_size": (ValueError, "kernel_size", {"embed_dim": 16, "num_heads": 4, "kernel_size": 1}),
    "stride": (ValueError, "stride", {"embed_dim": 16, "num_heads": 4, "kernel_size": 3, "stride": 4}),
    "dilation": (ValueError, "dilation", {"embed_dim": 16, "num_heads": 4, "kernel_size": 3, "dilation": 0}),
    "is_causal": (ValueError, "is_causal", {"embed_dim": 16, "num_heads": 4, "kernel_size": 3, "is_causal": 1}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_argument_errors(name):
    error, argument, arguments = ERRORS[name]
    with pytest.raises(error, match=argument):
        modules.NeighborhoodAttention2D(**arguments)


@pytest.mark.parametrize("fused", [True, False])
def test_input_errors(fused):
    layer = layer_of(2, kernel_size=5, dilation=2)
    with context.use_fused_na(fused):
        for shape in ((8, 9, 16), (1, 12, 12, 15), (1, 12, 9, 16)):  # rank, channels, an axis shorter than the window
            with pytest.raises(ValueError, match=r"shape|kernel_size"):
                layer(torch.randn(shape, dtype=torch.float64))
        layer(torch.randn(1, 12, 10, 16, dtype=torch.float64))


# --- As a module -----------------------------------------------------------------------------------------------------


def test_copies():
    layer = layer_of(2, rel_pos_bias=True, num_query_groups=2)
    x = tokens(2)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_repr_names_the_arguments():
    text = repr(layer_of(2, num_query_groups=2, rel_pos_bias=True))
    assert "num_query_groups=2" in text and "kernel_size=(3, 3)" in text and "has_bias=True" in text


@pytest.mark.parametrize("arguments", [{}, {"attn_drop": 0.25}])
def test_compile(arguments):
    layer = layer_of(2, rel_pos_bias=True, **arguments).float().eval()
    x = tokens(2).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for got, gradient in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(got, gradient)
    with context.use_fused_na(False):  # a switch recompiles
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("fused", [True, False])
def test_autocast(fused):
    layer = layer_of(2, rel_pos_bias=True).float()
    x = tokens(2).float()
    with context.use_fused_na(fused), torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert layer.rpb.grad.dtype == torch.float32

"""The attention layer's options: dropout, checkpoints, sinks, largest scores, neighborhoods, cuDNN, compiled calls."""

import contextlib
import math
import sys
from pathlib import Path

import pytest
import torch
from layer_cases import BACKENDS, layer, qkv, sdpa
from layer_oracle import attend, pairs

import vicus
from vicus.nn import Neighborhood, backends

sys.path.insert(0, str(Path(__file__).parents[1] / "torch"))
from masked import seen_by

# --- Dropout and checkpoints -----------------------------------------------------------------------------------------


def test_dropout_drops_in_training_alone():
    tensors = qkv()
    module = layer(attention_dropout=0.5)
    assert module.training
    assert module.explain(*tensors).backend == "unfused"
    assert not torch.equal(module(*tensors), module(*tensors))
    module.eval()
    assert module.explain(*tensors).backend == "flash"
    assert torch.equal(module(*tensors), layer()(*tensors))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    """Keys are all alike, so that an output is the share of weights that were kept, over 1 - p."""
    torch.manual_seed(0)
    keys, queries = 400, 200
    module = layer(2, 4, 1, attention_dropout=p)
    q, k = torch.randn(1, queries, 2, 4), torch.zeros(1, keys, 1, 4)
    q.requires_grad_()
    v = torch.ones(1, keys, 1, 4, requires_grad=True)
    output = module(q, k, v)
    shares = output.detach().unflatten(-1, (2, 4))
    assert (shares == shares[..., :1]).all()  # one draw for all features of a value
    kept = shares[0, :, :, 0] * (1 - p)
    deviation = math.sqrt(p * (1 - p) / keys)
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / math.sqrt(kept.numel())
    assert 0.9 * deviation < kept.std() < 1.1 * deviation
    assert abs(torch.corrcoef(kept.T)[0, 1]) < 0.3  # heads draw for themselves
    output.sum().backward()  # the gradient of a value: how often it was kept, over all queries and heads
    times = v.grad[0, :, 0, 0] * (1 - p) * keys
    assert abs(times.mean() - 2 * queries * (1 - p)) < 1e-2 * 2 * queries
    assert 0.85 < times.std() / math.sqrt(2 * queries * p * (1 - p)) < 1.15


class Tracker:
    """Keeps a state of the random numbers of its own, as Megatron's tracker does."""

    def __init__(self, seed):
        self.states = {"model-parallel-rng": torch.Generator().manual_seed(seed).get_state()}
        self.forks = 0

    def get_states(self):
        return {name: state.clone() for name, state in self.states.items()}

    def set_states(self, states):
        self.states = states

    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng"):
        self.forks += 1
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def test_dropout_draws_from_the_tracker():
    tensors = qkv()
    first, second = (layer(attention_dropout=0.5, get_rng_state_tracker=lambda: Tracker(3))(*tensors) for _ in range(2))
    assert torch.equal(first, second)
    state = torch.get_rng_state()
    tracker = Tracker(4)
    module = layer(attention_dropout=0.5, get_rng_state_tracker=lambda: tracker)
    assert not torch.equal(module(*tensors), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert tracker.forks == 1
    layer(attention_dropout=0.5, get_rng_state_tracker=lambda: tracker, sequence_parallel=True)(*tensors)
    assert tracker.forks == 1


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tracked", [False, True])
def test_checkpointing_changes_nothing(name, tracked):
    tracker = Tracker(5)
    options = {"get_rng_state_tracker": lambda: tracker} if tracked else {}
    module = layer(attention_dropout=0.5 if name == "unfused" else 0.0, attention_backend=name, **options)
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(7)
        tracker.__init__(5)
        tensors = qkv(grad=True)
        output = module(*tensors, checkpoint_core_attention=checkpoint)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_keeps_no_scores():
    kept = {}
    for checkpoint in (False, True):
        tensors = qkv(64, 64, grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            layer(attention_backend="unfused")(*tensors, checkpoint_core_attention=checkpoint)
        kept[checkpoint] = sum(sizes)
    assert kept[False] > 2 * 4 * 64 * 64
    assert kept[True] < kept[False] / 4


# --- Sinks, largest scores -------------------------------------------------------------------------------------------


def test_sinks():
    q, k, v = qkv(5, 5)
    one = layer(softmax_type="off-by-one")
    assert "softmax_offset" not in one.state_dict()
    learned = layer(softmax_type="learnable")
    assert learned.softmax_offset.shape == (4,)
    assert list(learned.state_dict()) == ["softmax_offset"]
    assert torch.equal(one(q, k, v), learned(q, k, v))
    learned.softmax_offset.data.fill_(-math.inf)
    torch.testing.assert_close(learned(q, k, v), layer()(q, k, v), atol=1e-6, rtol=1e-6)
    learned.softmax_offset.data.fill_(40.0)
    assert learned(q, k, v).abs().max() < 1e-10


def test_a_state_of_fp8_recipes_is_left_alone():
    module = layer(softmax_type="learnable")
    state = {"softmax_offset": torch.arange(4.0), "_extra_state": torch.zeros(3), "fused_attention._extra_state": None}
    assert module.load_state_dict(state).unexpected_keys == []
    assert torch.equal(module.softmax_offset.data, torch.arange(4.0))
    assert "_extra_state" in state


def test_largest_scores():
    q, k, v = (x[:1] for x in qkv(5, 5))
    output, largest = layer(return_max_logit=True, attn_mask_type="causal")(q, k, v)
    want, most = attend(*(x[0].double() for x in (q, k, v)), scale=8**-0.5, seen=pairs(5, 5, True, (-1, -1), False))
    torch.testing.assert_close(output[0].double(), want.flatten(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(largest.double(), most, atol=1e-5, rtol=1e-5)
    assert not largest.requires_grad


# --- Neighborhoods ---------------------------------------------------------------------------------------------------

LAYOUTS = [((10,), 3, 1, 1, False), ((6, 7), (3, 5), (1, 2), (2, 1), (True, False)), ((3, 4, 5), 3, 2, 1, True)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("layout", "kernel_size", "stride", "dilation", "is_causal"), LAYOUTS)
def test_neighborhoods(name, layout, kernel_size, stride, dilation, is_causal):
    tokens = math.prod(layout)
    windows = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    module = layer(
        4, (8, 6), 2, neighborhood={"layout": layout, **windows}, attn_mask_type=None, attention_backend=name
    )
    tensors = qkv(tokens, tokens, grad=True)
    got = module(*tensors)
    grids = [x.unflatten(1, layout) for x in tensors]
    want = vicus.neighborhood_attention(*grids, *windows.values()).flatten(1, len(layout)).flatten(2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    swapped = module(*(x.transpose(0, 1) for x in tensors), qkv_format="sbhd")
    torch.testing.assert_close(swapped.transpose(0, 1), got, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("layout", "kernel_size", "stride", "dilation", "is_causal"), LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_neighborhoods_with_all_the_rest(layout, kernel_size, stride, dilation, is_causal, bias):
    """By windows alone, and (with a bias of pairs) by pairs."""
    tokens = math.prod(layout)
    module = layer(
        *(4, (8, 6), 2),
        neighborhood=Neighborhood(layout, kernel_size, stride, dilation, is_causal),
        attn_mask_type=None,
        softcap=1.5,
        softmax_type="learnable",
        return_max_logit=True,
    )
    module.softmax_offset.data = torch.tensor([0.0, 1.0, -1.0, 0.5])
    tensors = qkv(tokens, tokens, grad=True)
    table = torch.randn(4, tokens, tokens, generator=torch.Generator().manual_seed(3))
    given = {"core_attention_bias": table[None], "core_attention_bias_type": "post_scale_bias"} if bias else {}
    got, largest = module(*tensors, **given)
    seen = seen_by(layout, kernel_size, stride, dilation, is_causal)
    twins = [x.detach().double().requires_grad_() for x in tensors]
    results = [
        attend(
            *(x[b] for x in twins),
            scale=8**-0.5,
            seen=seen,
            softcap=1.5,
            bias=table.double() if bias else None,
            sink=module.softmax_offset.detach().double(),
        )
        for b in range(2)
    ]
    want = torch.stack([output.flatten(1) for output, _ in results])
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    most = torch.stack([x for _, x in results]).amax(0)
    torch.testing.assert_close(largest.double(), most, atol=1e-5, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), twins), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)


def test_dropout_in_neighborhoods():
    torch.manual_seed(0)
    module = layer(4, 8, 2, neighborhood=Neighborhood((12, 12), 5), attn_mask_type=None, attention_dropout=0.25)
    q, k, v = qkv(144, 144, dims=(8, 8))
    whole = module.eval()(q, k, v)
    many = torch.stack([module.train()(q, k, v) for _ in range(300)])
    assert (many[0] != many[1]).any()
    deviation = many.std(0) / math.sqrt(300)
    assert ((many.mean(0) - whole).abs() < 6 * deviation).all()


# --- cuDNN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "groups"), [("no_mask", 4), ("causal", 2), ("causal_bottom_right", 1)])
def test_what_is_asked_of_cudnn(mask, groups, monkeypatch):
    """PyTorch's other kernels in cuDNN's place: the same function with the same arguments."""
    asked = []
    monkeypatch.setattr(backends, "sdpa_kernel", lambda one: asked.append(one) or contextlib.nullcontext())
    monkeypatch.setattr(backends.Fused, "supports", lambda self, problem: "")
    q, k, v = qkv(6, 6, groups=groups, dims=(8, 8))
    module = layer(4, 8, groups, attn_mask_type=mask, softmax_scale=0.3, attention_backend="fused")
    got = module(q, k, v)
    assert asked == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    torch.testing.assert_close(got, sdpa(q, k, v, is_causal=mask != "no_mask", scale=0.3), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled(name, monkeypatch):
    """The choice is made outside of the graph, anew on each call."""
    module, tensors = layer(attn_mask_type="causal", attention_backend=name), qkv(6, 6, grad=True)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), module(*tensors), atol=1e-6, rtol=1e-6)
    torch.autograd.grad(compiled(*tensors).sum(), tensors)
    monkeypatch.setenv(f"NVTE_{name.upper()}_ATTN", "0")
    with pytest.raises(ValueError, match=f"{name}: forbidden by NVTE_{name.upper()}_ATTN=0"):
        compiled(*tensors)

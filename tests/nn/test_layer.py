"""The attention layer beyond random calls: formats, packed sequences with gaps, overrides, dropout, checkpointing,
neighborhoods, reduced precision, autocast, and PyTorch's own attention beside it."""

import contextlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layer_oracle import attend, pairs, slopes

import vicus
from vicus.nn import DotProductAttention, Neighborhood, attention_backends, backends
from vicus.nn._masks import alibi_slopes

sys.path.insert(0, str(Path(__file__).parents[1] / "torch"))
from masked import seen_by

BACKENDS = ("flash", "unfused")


def qkv(queries=9, keys=7, *, batch=2, heads=4, groups=2, dims=(8, 6), dtype=torch.float32, grad=False, seed=0):
    """Tensors in the format bshd."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads, dims[0]), (keys, groups, dims[0]), (keys, groups, dims[1])]
    return [torch.randn(batch, *shape, dtype=dtype, generator=generator).requires_grad_(grad) for shape in shapes]


def layer(heads=4, dims=(8, 6), groups=2, **options):
    return DotProductAttention(heads, dims, groups, **{"qkv_format": "bshd", "attn_mask_type": "no_mask"} | options)


def sdpa(q, k, v, mask=None, **options):
    """PyTorch's attention for tensors in the format bshd."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options).transpose(1, 2).flatten(2)


# --- Beside PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["no_mask", "causal", "arbitrary", "bias"])
def test_agrees_with_scaled_dot_product_attention(name, groups, mask):
    tensors = qkv(12, 12, groups=groups, dims=(16, 16), grad=True)
    chosen = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    module = layer(4, 16, groups, attn_mask_type="no_mask" if mask == "bias" else mask, attention_backend=name)
    given, options = {}, {}
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "arbitrary":
        given["attention_mask"] = chosen < 0.5  # True hides; in PyTorch, True shows
        options["mask"] = chosen >= 0.5
    elif mask == "bias":
        given = {"core_attention_bias": chosen, "core_attention_bias_type": "post_scale_bias"}
        options["mask"] = chosen
    got, want = module(*tensors, **given), sdpa(*tensors, **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    arriving = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(*(torch.autograd.grad(x, tensors, arriving) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_as_near_as_pytorch(name, dtype):
    exact = qkv(65, 65, dims=(32, 32), dtype=torch.float64)
    reduced = [x.to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in reduced]
    module = layer(4, 32, attn_mask_type="causal", attention_backend=name)
    got, near = module(*reduced), sdpa(*reduced, is_causal=True)
    want = sdpa(*exact, is_causal=True)
    arriving = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    floor = torch.finfo(dtype).eps

    def check(one, other, reference):
        limit = 2 * (other.double() - reference).abs().max() + floor * reference.abs().max()
        assert (one.double() - reference).abs().max() <= limit

    check(got, near, want)
    gradients = [
        torch.autograd.grad(y, x, arriving.to(y.dtype)) for y, x in ((got, reduced), (near, reduced), (want, exact))
    ]
    for three in zip(*gradients, strict=True):
        check(*three)


def test_scores_of_half_precision_do_not_overflow():
    q, k, v = (torch.full((1, 3, 1, 64), 60.0, dtype=torch.float16) for _ in range(3))  # q . k is 230400
    module = layer(1, 64, 1, attention_backend="unfused")
    assert torch.equal(module(q, k, v), torch.full((1, 3, 64), 60.0, dtype=torch.float16))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast(name):
    tensors = qkv()
    module = layer(attention_backend=name)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*tensors)
        assert "bfloat16" in str(module.explain(*tensors))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(*tensors), atol=3e-2, rtol=3e-2)


# --- Formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_formats_hold_the_same(name):
    q, k, v = qkv(7, 7)
    module = layer(attn_mask_type="causal", attention_backend=name)
    want = module(q, k, v)
    assert want.shape == (2, 7, 24)
    swapped = [x.transpose(0, 1) for x in (q, k, v)]
    got = module(*swapped, qkv_format="sbhd")
    assert got.shape == (7, 2, 24)
    assert torch.equal(got.transpose(0, 1), want)
    assert torch.equal(module(*(x.contiguous() for x in swapped), qkv_format="sbhd"), got)
    bounds = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = module(
        *(x.flatten(0, 1) for x in (q, k, v)),
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
    )
    assert packed.shape == (14, 24)
    torch.testing.assert_close(packed, want.flatten(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_slices_of_one_projection_are_taken_in_place(name):
    whole = torch.randn(2, 9, (4 + 2 + 2) * 8, requires_grad=True)
    q, k, v = whole.unflatten(-1, (8, 8)).split((4, 2, 2), -2)
    module = layer(4, 8, attention_backend=name)
    torch.testing.assert_close(module(q, k, v), sdpa(q, k, v), atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(module(q, k, v).sum(), whole)[0].shape == whole.shape


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("told", [True, False])
def test_gaps_between_packed_sequences(name, told):
    """`[a a a 1 b b 2 2 c c c c 3]`: the digits belong to no sequence."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(13, n, 8, generator=generator).requires_grad_() for n in (4, 2, 2)]
    inside = torch.tensor([0, 1, 2, 4, 5, 8, 9, 10, 11])
    poisoned = [x.detach().clone() for x in tensors]
    for x in poisoned:
        x[[3, 6, 7, 12]] = torch.nan
        x.requires_grad_()
    lengths, starts = (torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 5, 9], [0, 4, 8, 13]))
    module = layer(4, 8, qkv_format="thd", attn_mask_type="padding_causal", attention_backend=name)
    longest = {"max_seqlen_q": 4, "max_seqlen_kv": 64} if told else {}
    got = module(
        *poisoned,
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        **longest,
    )
    want = module(*(x[inside] for x in tensors), cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    torch.testing.assert_close(got[inside], want, atol=1e-6, rtol=1e-6)
    outside = torch.tensor([3, 6, 7, 12])
    assert (got[outside] == 0).all()
    for one, other in zip(
        torch.autograd.grad(got.sum(), poisoned), torch.autograd.grad(want.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(one[inside], other[inside], atol=1e-5, rtol=1e-5)
        assert (one[outside] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_after_the_last_sequence_have_output_zero(name):
    tensors = [torch.randn(10, n, 8) for n in (4, 2, 2)]
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32)
    module = layer(4, 8, qkv_format="thd", attn_mask_type="padding", attention_backend=name)
    got = module(*tensors, cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    want = module(*(x[:7] for x in tensors), cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    torch.testing.assert_close(got[:7], want, atol=1e-6, rtol=1e-6)
    assert (got[7:] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mask", ["padding", "padding_causal", "padding_causal_bottom_right"])
def test_padding_anywhere(name, mask):
    """Padded tokens do not count, wherever they are: here at the start, as for generation in batches."""
    q, k, v = qkv(6, 6)
    module = layer(attn_mask_type=mask, window_size=(2, 0 if "causal" in mask else 2), attention_backend=name)
    padded = torch.tensor([[True, True, False, False, False, False], [False] * 6])
    poisoned = [x.masked_fill(padded[..., None, None], torch.nan) for x in (q, k, v)]
    got = module(*poisoned, attention_mask=padded[:, None, None])
    alone = module(*(x[:1, 2:] for x in (q, k, v)), attention_mask=torch.zeros(1, 1, 1, 4, dtype=torch.bool))
    torch.testing.assert_close(got[:1, 2:], alone, atol=1e-6, rtol=1e-6)
    assert (got[0, :2] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_the_list_of_queries_stands_for_that_of_keys(name):
    q, k, v = qkv(6, 6)
    module = layer(attn_mask_type="padding", attention_backend=name)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    assert torch.equal(module(q, k, v, cu_seqlens_q=bounds), module(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_query_without_keys_has_output_and_gradient_zero(name):
    tensors = qkv(5, 2, grad=True)
    module = layer(attn_mask_type="causal_bottom_right", attention_backend=name)
    got = module(*tensors)
    assert (got[:, :3] == 0).all()
    gradient = torch.autograd.grad(got.sum(), tensors)[0]
    assert (gradient[:, :3] == 0).all()
    assert not any(x.isnan().any() for x in torch.autograd.grad(module(*tensors).sum(), tensors))
    mask = torch.ones(2, 4, 5, 2, dtype=torch.bool)
    mask[1] = False
    hidden = module(*tensors, attn_mask_type="arbitrary", attention_mask=mask)
    assert (hidden[0] == 0).all()
    bias = torch.full((1, 1, 5, 2), -math.inf)
    bias[..., 1:, :] = 0.5
    more = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias, "attn_mask_type": "no_mask"}
    assert (module(*tensors, **more)[:, 0] == 0).all()


# --- Overrides and arguments of the constructor ----------------------------------------------------------------------


def test_a_call_overrides_the_layer():
    tensors = qkv(6, 6)
    module = layer(attn_mask_type="causal", window_size=(2, 0))
    want = layer(attn_mask_type="no_mask", window_size=(1, 3))(*tensors)
    assert torch.equal(module(*tensors, attn_mask_type="no_mask", window_size=(1, 3)), want)
    assert torch.equal(module(*tensors, window_size=(-1, 0)), layer(attn_mask_type="causal")(*tensors))
    again = layer(attn_mask_type="causal")  # its window, (-1, 0), is the mask's and goes with it
    assert torch.equal(again(*tensors, attn_mask_type="no_mask"), layer()(*tensors))


def test_names_of_masks():
    tensors, bounds = qkv(6, 6), torch.tensor([0, 4, 10], dtype=torch.int32)
    want = layer(attn_mask_type="padding_causal")(*tensors, cu_seqlens_q=bounds)
    for name in ("padding,causal", "causal,padding", "causal_padding"):
        assert torch.equal(layer(attn_mask_type=name)(*tensors, cu_seqlens_q=bounds), want)

    class AttnMaskType:
        name = "padding_causal"  # as a member of Megatron's enum

    assert torch.equal(layer(attn_mask_type=AttnMaskType())(*tensors, cu_seqlens_q=bounds), want)


def test_the_mask_is_causal_where_none_is_named():
    tensors = qkv(6, 6)
    assert torch.equal(
        DotProductAttention(4, (8, 6), 2, qkv_format="bshd")(*tensors), layer(attn_mask_type="causal")(*tensors)
    )


@pytest.mark.parametrize(
    ("mask", "given", "taken"),
    [
        ("causal", (3, 2), (3, 0)),
        ("causal", (-1, -1), (-1, 0)),
        ("no_mask", (-1, 0), (-1, -1)),
        ("causal", (3, -1), (3, 0)),
    ],
)
def test_windows_are_cut_to_the_mask_with_a_warning(mask, given, taken):
    with pytest.warns(UserWarning, match="window_size is"):
        assert layer(attn_mask_type=mask, window_size=given).window_size == taken


def test_top_left_windows_of_other_lengths_go_to_unfused():
    tensors = qkv(9, 7)
    module = layer(window_size=(1, 1), bottom_right_diagonal=False)
    assert module.explain(*tensors).backend == "unfused"
    seen = pairs(9, 7, False, (1, 1), False)
    with attention_backends(flash=False):
        torch.testing.assert_close(module(*tensors)[:, :8], sdpa(*tensors, mask=seen)[:, :8], atol=1e-5, rtol=1e-5)
    assert layer(window_size=(1, 1), bottom_right_diagonal=False).explain(*qkv(7, 7)).backend == "flash"


def test_heads_of_a_tensor_parallel_rank():
    module = DotProductAttention(8, 16, 4, tp_size=2, qkv_format="bshd")
    assert module(*qkv(5, 5, heads=4, groups=2, dims=(16, 16))).shape == (2, 5, 64)


def test_slopes_of_alibi_are_the_published_ones():
    for heads in (1, 2, 3, 4, 6, 8, 12, 16, 40):
        torch.testing.assert_close(alibi_slopes(heads).double(), torch.tensor(slopes(heads)).double())


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


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("name", ["flash", "fused", "unfused"])
@pytest.mark.parametrize("mask", ["no_mask", "causal"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("training", [False, True])
def test_backends_agree_on_the_gpu(name, mask, groups, training):
    exact = qkv(256, 256, heads=8, groups=groups, dims=(64, 64), dtype=torch.float64)
    half = [x.to("cuda", torch.bfloat16).requires_grad_(training) for x in exact]
    exact = [x.detach().cpu().double().requires_grad_(training) for x in half]
    module = layer(8, 64, groups, attn_mask_type=mask, attention_backend=name)
    if module.explain(*half).backend is None:
        assert training  # the engine has no backward pass, and says so
        return
    got, want = module(*half), sdpa(*exact, is_causal=mask == "causal")
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-2, rtol=2e-2)
    if training:
        arriving = torch.randn(want.shape, dtype=torch.float64)
        ours = torch.autograd.grad(got, half, arriving.to(got))
        for one, other in zip(ours, torch.autograd.grad(want, exact, arriving), strict=True):
            torch.testing.assert_close(one.cpu().double(), other, atol=6e-2, rtol=6e-2)


@needs_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_neighborhoods_on_the_gpu(name):
    q, k, v = qkv(64, 64, dims=(32, 32))
    module = layer(4, 32, 2, neighborhood=Neighborhood((8, 8), 3), attn_mask_type=None, attention_backend=name)
    want = module(q, k, v)
    with torch.no_grad():
        got = module(*(x.to("cuda", torch.bfloat16) for x in (q, k, v)))
    torch.testing.assert_close(got.cpu().float(), want, atol=2e-2, rtol=2e-2)

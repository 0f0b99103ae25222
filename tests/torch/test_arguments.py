"""Wrong arguments: the exception type of NATTEN 0.21, and a message that names the argument and what is allowed."""

import re

import pytest
import torch

import vicus
from vicus import _arguments, _attend
from vicus.functional import neighborhood_attention_generic
from vicus.types import KernelSchedule

INT32 = torch.int32


def tensors(layout=(6, 7), dtype=torch.float32, **shape):
    batch, heads, heads_kv = shape.get("batch", 2), shape.get("heads", 4), shape.get("heads_kv", 2)
    dim, dim_v = shape.get("dim", 8), shape.get("dim_v", 8)
    sizes = ((heads, dim), (heads_kv, dim), (heads_kv, dim_v))
    return [torch.zeros(batch, *layout, *size, dtype=dtype) for size in sizes]


def changed(at, change, layout=(6, 7)):
    made = tensors(layout)
    made[at] = change(made[at])
    return made


def nested(x):
    return torch.nested.nested_tensor([x[0], x[1]], layout=torch.strided)


Q, K, V = range(3)
KIND = {  # of the tensors of na2d and attention: what is wrong, exception, start of the message
    "key sparse": (K, lambda x: x.to_sparse(), NotImplementedError, "key"),
    "query sparse": (Q, lambda x: x.to_sparse(), NotImplementedError, "query"),
    "value nested": (V, nested, NotImplementedError, "value"),
    "query nested": (Q, nested, NotImplementedError, "query"),
    "key device": (K, lambda x: x.to("meta"), ValueError, "key.device"),
    "value dtype": (V, lambda x: x.half(), ValueError, "value.dtype"),
    "key batch": (K, lambda x: x[:1], ValueError, "key.shape[0]"),
    "value batch": (V, lambda x: x[:1], ValueError, "value.shape[0]"),
    "key rank": (K, lambda x: x[0], ValueError, "key.shape"),
    "value rank": (V, lambda x: x[None], ValueError, "value.shape"),
    "key head dim": (K, lambda x: x[..., :4], ValueError, "key.shape[-1]"),
    "value tokens": (V, lambda x: x[:, :5], ValueError, "value.shape[1]"),
    "value heads": (V, lambda x: x[..., :1, :], ValueError, "value.shape[-2]"),
    "query heads": (Q, lambda x: x[..., :3, :], ValueError, "key.shape[-2]"),
    "value no features": (V, lambda x: x[..., :0], ValueError, "value.shape[-1]"),
    "no tensor": (K, lambda x: x.numpy(), ValueError, "key"),
}


def says(start):
    return rf"^{re.escape(start)}.*(; allowed: |only dense)"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", KIND)
@pytest.mark.parametrize("dense", [False, True])
def test_tensors(case, dense):
    at, change, exception, start = KIND[case]
    with pytest.raises(exception, match=says(start)):
        if dense:
            vicus.attention(*changed(at, change, (6,)), return_lse=True)
        else:
            vicus.na2d(*changed(at, change), 3, return_lse=True)


# The quick way leaves some rules to the core, which words them its own way: only the exception must be the same.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", [name for name in KIND if name != "no tensor"])
@pytest.mark.parametrize("dense", [False, True])
def test_tensors_on_the_quick_way(case, dense):
    at, change, exception, _ = KIND[case]
    window = (3, 3)
    vicus.na2d(*tensors(), window)  # remembered
    with pytest.raises(exception):
        vicus.attention(*changed(at, change, (6,))) if dense else vicus.na2d(*changed(at, change), window)


def test_layout_of_query_and_key_must_agree_in_neighborhoods_only():
    with pytest.raises(ValueError, match=says("key.shape[1]")):
        vicus.na2d(*changed(K, lambda x: x[:, :5]), 3, return_lse=True)
    q, k, v = tensors((6,))
    vicus.attention(q[:, :5], k, v)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes(dtype):
    made = [x.to(dtype) for x in tensors()]
    for function in (lambda: vicus.na2d(*made, 3), lambda: vicus.attention(*[x.flatten(1, 2) for x in made])):
        with pytest.raises(ValueError, match=r"^query\.dtype is .*; allowed: float32"):
            function()


@pytest.mark.parametrize(("function", "rank"), [(vicus.na1d, 1), (vicus.na2d, 2), (vicus.na3d, 3)])
def test_rank_of_the_function(function, rank):
    for other in (1, 2, 3):
        made = tensors((4,) * other)
        if other == rank:
            function(*made, 2)
        else:
            with pytest.raises(ValueError, match=rf"^query\.shape is .*; allowed: {rank + 3} dimensions"):
                function(*made, 2)


@pytest.mark.parametrize("layout", [(), (4,) * 4])
def test_rank_of_no_function(layout):
    for function in (vicus.neighborhood_attention, neighborhood_attention_generic):
        with pytest.raises(ValueError, match=r"^query\.shape"):
            function(*tensors(layout), 2)
    with pytest.raises(ValueError, match=r"^query\.shape"):
        vicus.attention(*tensors(layout))


MASKS = {
    "kernel_size": [1, 0, -3, 3.0, "3", None, (3,), (3, 3, 3), (3, 1), (3, 3.0), [3, None], torch.tensor(3), True],
    "stride": [0, -1, 4, (1, 4), (1,), 1.0, "1", (1, 0)],
    "dilation": [0, -2, (1,), 2.0, (1, None)],
    "is_causal": [0, 1, "no", (True,), (True, 1), (True, False, True), [None, False]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in MASKS.items() for v in values])
def test_mask(name, value):
    arguments = {"kernel_size": 3, name: value}
    with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: "):
        vicus.na2d(*tensors(), **arguments)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(7, 1), ((6, 8), 1), (3, (2, 3))])
def test_window_beyond_the_axis(kernel_size, dilation):
    for function in (vicus.na2d, neighborhood_attention_generic):
        with pytest.raises(ValueError, match=r"^kernel_size \* dilation is .*; allowed: at most the token layout"):
            function(*tensors(), kernel_size, 1, dilation)
    vicus.neighborhood_attention(*tensors(), kernel_size, 1, dilation)


def test_forms_of_the_mask():
    expected = ((3, 3), (1, 1), (1, 1), (False, False))
    for given in ((3,), (3, 1, 1, False), ([3, 3], None, None, None), ((3, 3), (1, 1), [1, 1], (False, False))):
        assert _arguments.per_axis(2, *given, strict=True) == expected
    assert _arguments.per_axis(3, torch.Size([1, 2, 3]))[0] == (1, 2, 3)


EXTRA = {
    "one alone": (lambda k, v: (k, None), ValueError, "additional_keys and additional_values"),
    "values alone": (lambda k, v: (None, v), ValueError, "additional_keys and additional_values"),
    "rank": (lambda k, v: (k[0], v), ValueError, "additional_keys.shape"),
    "batch": (lambda k, v: (k[:1], v), ValueError, "additional_keys.shape[0]"),
    "heads": (lambda k, v: (k, v[:, :, :1]), ValueError, "additional_values.shape[-2]"),
    "dim": (lambda k, v: (k[..., :4], v), ValueError, "additional_keys.shape[-1]"),
    "tokens": (lambda k, v: (k, v[:, :2]), ValueError, "additional_values.shape[1]"),
    "dtype": (lambda k, v: (k.double(), v), ValueError, "additional_keys.dtype"),
    "device": (lambda k, v: (k, v.to("meta")), ValueError, "additional_values.device"),
    "sparse": (lambda k, v: (k.to_sparse(), v), NotImplementedError, "additional_keys"),
}


@pytest.mark.parametrize("case", EXTRA)
def test_additional_tokens(case):
    change, exception, start = EXTRA[case]
    keys, values = change(torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8))
    with pytest.raises(exception, match=rf"^{re.escape(start)}"):
        vicus.na2d(*tensors(), 3, additional_keys=keys, additional_values=values)
    with pytest.raises(exception, match=rf"^{re.escape(start)}"):
        vicus.attention(*tensors((6,)), additional_keys=keys, additional_values=values)


@pytest.mark.parametrize(
    "rpb", [torch.zeros(4, 5), torch.zeros(4, 5, 7), torch.zeros(2, 5, 5), torch.zeros(4, 5, 5).half(), 3]
)
def test_rpb(rpb):
    with pytest.raises(ValueError, match=r"^rpb.* is .*; allowed: "):
        vicus.na2d(*tensors(), 3, rpb=rpb)


OTHERS = [
    ({"backend": "cudnn"}, NotImplementedError, "backend"),
    ({"kernel_schedule": "fast"}, ValueError, "kernel_schedule"),
    ({"kernel_schedule": 1}, ValueError, "kernel_schedule"),
    ({"scale": "0.5"}, ValueError, "scale"),
    ({"scale": float("nan")}, ValueError, "scale"),
]


@pytest.mark.parametrize(("arguments", "exception", "start"), OTHERS)
def test_other_arguments(arguments, exception, start):
    with pytest.raises(exception, match=rf"^{start} is .*; allowed: "):
        vicus.na2d(*tensors(), 3, **arguments)
    with pytest.raises(exception, match=rf"^{start} is .*; allowed: "):
        vicus.attention(*tensors((6,)), **arguments)


@pytest.mark.parametrize("name", ["q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_splits"])
@pytest.mark.parametrize("value", [8, (8,), (4, 4, 4), (4, 4.0), "44"])
def test_tile_shapes(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: a sequence of 2 integers"):
        vicus.na2d(*tensors(), 3, **{name: value})


def test_tiles_of_the_engine():
    for tile in ((4, 4), (8, 8)):
        vicus.na2d(*tensors(), 3, q_tile_shape=tile, kv_tile_shape=tile)
    with pytest.raises(ValueError, match="tile_q"):
        vicus.na2d(*tensors(), 3, q_tile_shape=(16, 16))
    vicus.attention(*tensors((6,)), q_tile_size=32, kv_tile_size=32)
    with pytest.raises(ValueError, match="q_tile_size"):
        vicus.attention(*tensors((6,)), q_tile_size=(4, 4))


def test_arguments_for_natten_are_accepted():
    q, k, v = tensors()
    extra = {"additional_keys": torch.zeros(2, 3, 2, 8), "additional_values": torch.zeros(2, 3, 2, 8)}
    for schedule in (None, "non", "coop", "pp", KernelSchedule.NonPersistent):
        for backend in (None, "cutlass-fna", "hopper-fna", "blackwell-fna", "cpu", "reference"):
            vicus.na2d(
                *(q, k, v, 3, 1, 1, False, None, *extra.values()),
                attention_kwargs={"backend": "cutlass-fmha", "run_persistent_kernel": False},
                backend=backend,
                backward_use_pt_reduction=True,
                run_persistent_kernel=False,
                kernel_schedule=schedule,
                torch_compile=True,
            )


def test_attention_kwargs():
    with pytest.raises(TypeError, match=r"^attention_kwargs has 'is_causal'; allowed: "):
        vicus.na2d(*tensors(), 3, attention_kwargs={"is_causal": True})
    with pytest.raises(NotImplementedError, match="backend"):
        vicus.na2d(*tensors(), 3, attention_kwargs={"backend": "cutlass"})


# --- Dense attention -------------------------------------------------------------------------------------------------

DENSE = [
    ({"is_causal": 1}, "is_causal"),
    ({"is_causal": None}, "is_causal"),
    ({"causal_alignment": "left"}, "causal_alignment"),
    ({"window_size": 3}, "window_size"),
    ({"window_size": (3,)}, "window_size"),
    ({"window_size": (-2, 0)}, "window_size"),
    ({"window_size": (1.0, 0)}, "window_size"),
    ({"is_causal": True, "window_size": (3, 1)}, "window_size[1]"),
    ({"key_lengths": [6, 6]}, "key_lengths"),
    ({"key_lengths": torch.tensor([6.0, 6.0])}, "key_lengths"),
    ({"key_lengths": torch.tensor([6])}, "key_lengths.shape"),
    ({"key_lengths": torch.tensor([6, 7])}, "key_lengths[1]"),
    ({"key_lengths": torch.tensor([6, 6], device="meta")}, "key_lengths.device"),
    ({"attn_mask": 1}, "attn_mask"),
    ({"attn_mask": torch.zeros(6, 6, dtype=torch.int64)}, "attn_mask.dtype"),
    ({"attn_mask": torch.zeros(6, 5)}, "attn_mask.shape"),
    ({"attn_mask": torch.zeros(1, 1, 1, 6, 6)}, "attn_mask.shape"),
    ({"attn_mask": torch.zeros(6, 6, device="meta")}, "attn_mask.device"),
]


@pytest.mark.parametrize(("arguments", "start"), DENSE)
def test_dense_arguments(arguments, start):
    with pytest.raises(ValueError, match=rf"^{re.escape(start)} is .*; allowed: "):
        vicus.attention(*tensors((6,)), **arguments)


def packed(**changes):
    given = {
        "cumulative_seqlen_Q": torch.tensor([0, 2, 6], dtype=INT32),
        "cumulative_seqlen_KV": torch.tensor([0, 3, 6], dtype=INT32),
        "max_seqlen_Q": 4,
        "max_seqlen_KV": 3,
    }
    return given | changes


PACKED = [
    (packed(cumulative_seqlen_Q=None), "cumulative_seqlen_Q"),
    (packed(max_seqlen_KV=None), "cumulative_seqlen_Q"),
    ({"max_seqlen_Q": 4}, "cumulative_seqlen_Q"),
    (packed(max_seqlen_Q=7), "max_seqlen_Q"),
    (packed(max_seqlen_KV=-1), "max_seqlen_KV"),
    (packed(max_seqlen_KV=3.0), "max_seqlen_KV"),
    (packed(max_seqlen_KV=0), "max_seqlen_Q, max_seqlen_KV"),
    (packed(cumulative_seqlen_Q=[0, 2, 6]), "cumulative_seqlen_Q"),
    (packed(cumulative_seqlen_Q=torch.tensor([0, 2, 6])), "cumulative_seqlen_Q.dtype"),
    (packed(cumulative_seqlen_KV=torch.tensor([[0, 6]], dtype=INT32)), "cumulative_seqlen_KV.shape"),
    (packed(cumulative_seqlen_KV=torch.tensor([0, 6], dtype=INT32)), "cumulative_seqlen_KV.shape"),
    (packed(cumulative_seqlen_Q=torch.tensor([0], dtype=INT32)), "cumulative_seqlen_Q.shape"),
    (packed(cumulative_seqlen_Q=torch.tensor([0, 2, 6], dtype=INT32, device="meta")), "cumulative_seqlen_Q.device"),
    (packed(cumulative_seqlen_Q=torch.tensor([0, 2, 5], dtype=INT32)), "cumulative_"),
    (packed(cumulative_seqlen_Q=torch.tensor([0, 7, 6], dtype=INT32)), "cumulative_"),
    (packed(key_lengths=torch.tensor([6])), "key_lengths or attn_mask"),
    (packed(attn_mask=torch.zeros(6, 6)), "key_lengths or attn_mask"),
    ({"seqlens_Q": torch.tensor([2, 4], dtype=INT32)}, "seqlens_KV"),
]


@pytest.mark.parametrize(("arguments", "start"), PACKED)
def test_packed_sequences(arguments, start):
    made = tensors((6,), batch=1)
    vicus.attention(*made, **packed())
    with pytest.raises(ValueError, match=rf"^{re.escape(start)}"):
        vicus.attention(*made, **arguments)


def test_packed_sequences_are_one_batch_entry():
    with pytest.raises(ValueError, match=r"^query\.shape\[0\] is 2; allowed: 1"):
        vicus.attention(*tensors((6,)), **packed())


# --- Merging ---------------------------------------------------------------------------------------------------------

OUT, LSE = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3)
MERGE = [
    (([OUT], [LSE]), ValueError, "len(outputs)"),
    (([], []), ValueError, "len(outputs)"),
    (([OUT, OUT], [LSE]), ValueError, "len(lse_tensors)"),
    (([OUT, OUT[:1]], [LSE, LSE]), ValueError, "outputs[1].shape"),
    (([OUT[0], OUT[0]], [LSE[0], LSE[0]]), ValueError, "outputs[0].shape"),
    (([OUT, OUT], [LSE, LSE[..., None]]), ValueError, "lse_tensors[1].shape"),
    (([OUT, OUT.half()], [LSE, LSE]), ValueError, "outputs[1].dtype"),
    (([OUT, OUT], [LSE, LSE.long()]), ValueError, "lse_tensors[1]"),
    (([OUT, OUT.to("meta")], [LSE, LSE]), ValueError, "outputs[1].device"),
    (([OUT.long(), OUT.long()], [LSE, LSE]), ValueError, "outputs[0].dtype"),
    (([OUT.to_sparse(), OUT], [LSE, LSE]), NotImplementedError, "outputs[0]"),
]


@pytest.mark.parametrize(("arguments", "exception", "start"), MERGE)
def test_merge(arguments, exception, start):
    with pytest.raises(exception, match=rf"^{re.escape(start)}"):
        vicus.merge_attentions(*arguments)


# --- Options ---------------------------------------------------------------------------------------------------------


def test_options_are_empty_by_default():
    assert _arguments.pack_options() == ()
    assert len(_arguments.pack_options(deterministic=True)) == 16


def options_of(monkeypatch, **arguments):
    seen = []
    real = _attend.call
    monkeypatch.setattr(_attend, "call", lambda *args: seen.append(args[-1]) or real(*args))
    made = [x.requires_grad_() for x in tensors()]
    vicus.na2d(*made, 3, return_lse=True, **arguments)  # not the quick way
    return seen[0]


def test_switches_reach_the_operator(monkeypatch):
    assert options_of(monkeypatch) == ()
    assert options_of(monkeypatch, deterministic=True)[1:3] == (1, 0)
    assert options_of(monkeypatch, backward_kv_splits=(2, 3))[4:7] == (0, 2, 3)
    assert options_of(monkeypatch, q_tile_shape=(4, 2))[7:10] == (0, 4, 2)
    assert options_of(monkeypatch, backward_q_tile_shape=(4, 2))[10:13] == (0, 4, 2)
    assert options_of(monkeypatch, backend="reference")[0] == 1
    with vicus.use_deterministic_algorithms():
        assert options_of(monkeypatch)[1:3] == (1, 0)
        assert options_of(monkeypatch, deterministic=False)[1] == 0
    with vicus.use_kv_parallelism_in_fused_na(False):
        assert options_of(monkeypatch)[2] == 0
    with vicus.set_memory_usage_preference("strict"):
        assert options_of(monkeypatch)[3] == 1

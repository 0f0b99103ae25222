"""Packed sequences and key lengths on CUDA: which operator a call reaches and with what, by tensors without data."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vicus
from vicus import _attend, _ops, backends

INT32 = torch.int32


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors on a GPU that is not there; collects the arguments of the dense operator."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_CAPABILITIES", {})
    calls = []
    monkeypatch.setattr(_attend, "call", lambda op, function, tensors, *rest: calls.append((op, tensors, rest)) or FAKE)
    with FakeTensorMode():
        yield calls


FAKE = (None, None)


def tensors(batch=1, queries=7, keys=9, dtype=torch.bfloat16):
    shapes = [(batch, queries, 4, 64), (batch, keys, 2, 64), (batch, keys, 2, 64)]
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def packed(count=3, **more):
    lists = {f"cumulative_seqlen_{x}": torch.empty(count + 1, dtype=INT32, device="cuda") for x in ("Q", "KV")}
    return lists | {"max_seqlen_Q": 4, "max_seqlen_KV": 5} | more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_sequences_reach_the_engine_as_they_are(on_gpu, dtype):
    given = packed()
    vicus.attention(*tensors(dtype=dtype), **given, is_causal=True, return_lse=True)
    ((op, inputs, rest),) = on_gpu
    assert op is _ops.dense
    assert inputs[5] is None and inputs[6] is None
    assert inputs[7] is given["cumulative_seqlen_Q"] and inputs[8] is given["cumulative_seqlen_KV"]
    assert rest[:5] == (4, 5, 1, -1, -1)


def test_key_lengths_become_what_kernels_read(on_gpu):
    q, k, v = tensors(batch=3)
    lengths = torch.empty_strided((3,), (2,), dtype=torch.int64, device="cuda")
    vicus.attention(q, k, v, key_lengths=lengths, return_lse=True)
    ((_, inputs, rest),) = on_gpu
    assert inputs[6].dtype == INT32 and inputs[6].is_contiguous() and inputs[6].shape == (3,)
    assert inputs[7] is None and inputs[8] is None
    assert rest[:2] == (0, 0)


def test_gradients_of_packed_sequences_stay_here(on_gpu, monkeypatch):
    monkeypatch.setattr(_attend, "_requires_grad", lambda *x: x[0] is not None)  # of query, not of a bias
    vicus.attention(*tensors(), **packed(), return_lse=True)
    ((op, inputs, rest),) = on_gpu
    assert op is _ops.dense and inputs[7].shape == (4,) and rest[:2] == (4, 5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_seqlen_Q": None}, "some are None"),
        ({"max_seqlen_Q": 8}, "max_seqlen_Q is 8; allowed: an integer, 0 to the number of tokens, 7"),
        ({"cumulative_seqlen_Q": torch.zeros(4, dtype=INT32)}, "cumulative_seqlen_Q.device is cpu"),
    ],
)
def test_rules_are_those_of_the_cpu(on_gpu, more, words):
    with pytest.raises(ValueError, match=words):
        vicus.attention(*tensors(), **packed(**more))
    assert not on_gpu


def test_operators_know_shapes_for_lists_on_a_gpu():
    with FakeTensorMode():
        q, k, v = tensors()
        inputs = [q, k, v, None, None, None, None, *list(packed().values())[:2]]
        settings = [4, 5, 1, -1, -1, 0.3, []]
        output, logsumexp = _ops.dense(*inputs, *settings)
        assert output.shape == (1, 7, 4, 64) and output.device.type == "cuda" and output.dtype == q.dtype
        assert logsumexp.shape == (1, 7, 4) and logsumexp.dtype == torch.float32
        grads = _ops.dense_backward(output, None, *inputs, output, logsumexp, *settings, 0b111)
        assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]


def test_longer_sequences_are_no_new_graph():
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(vicus.attention, backend=count, fullgraph=True, dynamic=True)
    for n in (5, 9, 13):
        given = [torch.randn(1, 2 * n, 1, 8) for _ in range(3)]
        bounds = torch.tensor([0, n, 2 * n], dtype=INT32)
        lists = {"cumulative_seqlen_Q": bounds, "cumulative_seqlen_KV": bounds, "max_seqlen_Q": n, "max_seqlen_KV": n}
        assert torch.equal(compiled(*given, **lists), vicus.attention(*given, **lists))
    assert len(graphs) == 1


def test_waiting_for_lengths_is_logged(caplog, monkeypatch):
    """Of sequences on a GPU: the CPU has nothing to wait for."""
    lengths = torch.tensor([3, 4], dtype=INT32)
    q, k, v = (torch.zeros(1, 7, 1, 8) for _ in range(3))
    with caplog.at_level(logging.DEBUG, logger="vicus"):
        vicus.attention(q, k, v, seqlens_Q=lengths, seqlens_KV=lengths)
        assert "waiting" not in caplog.text
        with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # these have no values to wait for
            lengths = torch.empty(2, dtype=INT32, device="cuda")
            vicus.attention(*tensors(), seqlens_Q=lengths, seqlens_KV=lengths)
    assert "2 packed sequences: waiting for cuda" in caplog.text

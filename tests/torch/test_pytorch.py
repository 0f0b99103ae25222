"""The public functions in the company of the rest of PyTorch: dtypes, autocast, torch.compile, checkpointing, forward
mode, torch.func, threads; and the quick way that calls without any of it take."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from masked import by_hand, flat, qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import vicus
from vicus import _attend, _ops, _quick, backends, context, functional

# --- Dtypes and autocast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_results(dtype):
    tensors = [x.to(dtype).requires_grad_() for x in qkv((6, 7))]
    output, logsumexp = vicus.na2d(*tensors, 3, return_lse=True)
    assert output.dtype == dtype
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    output.sum().backward()
    assert all(x.grad.dtype == dtype for x in tensors)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_that_of_sdpa(grad):
    tensors = qkv((6, 7), heads_kv=4, dim_v=8, grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        output, logsumexp = vicus.na2d(*tensors, 3, return_lse=True)
        dense = vicus.attention(*map(flat, tensors))
        sdpa = F.scaled_dot_product_attention(*(flat(x).transpose(1, 2) for x in tensors))
        from_float64 = vicus.na2d(*(x.double() for x in tensors), 3)
    assert output.dtype == dense.dtype == sdpa.dtype == torch.bfloat16
    assert logsumexp.dtype == torch.float32
    assert from_float64.dtype == torch.float64
    expected = vicus.na2d(*(x.bfloat16() for x in tensors), 3)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    if grad:
        grads = torch.autograd.grad(output.float().sum(), tensors)
        assert all(g.dtype == torch.float32 for g in grads)


def test_autocast_reaches_no_composition():
    q, k, v = map(flat, qkv((6, 7)))
    bias = torch.randn(42, 42, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logsumexp = vicus.attention(q, k, v, attn_mask=bias, return_lse=True)[1]
    rounded = (x.bfloat16().float() for x in (q, k, v))
    torch.testing.assert_close(logsumexp, by_hand(*rounded, bias)[1], rtol=1e-5, atol=1e-5)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_breaks_for_any_batch_and_layout(fresh_compiler, grad):
    def function(query, key, value, rpb):
        output, logsumexp = vicus.na2d(query, key, value, (3, 3), dilation=(1, 2), rpb=rpb, return_lse=True)
        return output * 2 + logsumexp.unsqueeze(-1) + vicus.na2d(query, key, value, 3)

    compiled = torch.compile(function, backend=fresh_compiler, fullgraph=True, dynamic=True)
    rpb = torch.randn(4, 5, 5, requires_grad=grad)
    for batch, layout in ((3, (7, 9)), (5, (10, 11)), (6, (12, 13))):  # sizes that agree would be guarded on
        tensors = [*qkv(layout, batch=batch, grad=grad), rpb]
        got, expected = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(got, expected)
        if grad:
            for a, b in zip(*(torch.autograd.grad(x.sin().sum(), tensors) for x in (got, expected)), strict=True):
                torch.testing.assert_close(a, b)
    assert fresh_compiler.frame_count == 1


def test_compile_dense_and_packed(fresh_compiler):
    def function(query, key, value, cumulative):
        packed = vicus.attention(query, key, value, True, None, None, None, cumulative, cumulative, 5, 5)
        masked = vicus.attention(query, key, value, attn_mask=torch.ones(query.shape[1], key.shape[1]).bool())
        return vicus.merge_attentions([packed, masked], [query[..., 0], query[..., 1]])[0]

    compiled = torch.compile(function, backend=fresh_compiler, fullgraph=True, dynamic=True)
    for length in (11, 13):
        tensors = qkv((length,), batch=1, grad=True)
        cumulative = torch.tensor([0, 3, length], dtype=torch.int32)
        got, expected = compiled(*tensors, cumulative), function(*tensors, cumulative)
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert fresh_compiler.frame_count == 1


def test_compile_with_inductor():
    torch._dynamo.reset()

    def function(x):  # inductor picks the layouts around the operator
        query, key, value = x.unflatten(-1, (3, 4, 8)).unbind(-3)
        return vicus.na2d(query.relu(), key.sin(), value, 3).flatten(-2).mT.cos()

    x = torch.randn(2, 6, 7, 96, requires_grad=True)
    got, expected = torch.compile(function, fullgraph=True)(x), function(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))


def test_compile_finds_errors():
    torch._dynamo.reset()
    q, k, v = qkv((6, 7))
    with pytest.raises(Exception, match="kernel_size"):
        torch.compile(lambda: vicus.na2d(q, k, v, 8), backend="eager", fullgraph=True)()


def test_export():
    class Block(torch.nn.Module):
        def forward(self, query, key, value):
            return vicus.na2d(query, key, value, 3)

    tensors = tuple(qkv((6, 7)))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Block(), tensors, dynamic_shapes=({0: batch},) * 3)
    others = qkv((6, 7), batch=5)
    torch.testing.assert_close(program.module()(*others), vicus.na2d(*others, 3))


# --- Meta tensors, checkpointing, forward mode, torch.func, threads --------------------------------------------------


def test_meta_tensors_have_shapes():
    q, k, v = (x.to("meta") for x in qkv((6, 7)))
    output, logsumexp = vicus.na2d(q, k, v, 3, return_lse=True)
    assert output.shape == (2, 6, 7, 4, 6) and logsumexp.shape == (2, 6, 7, 4)
    assert vicus.attention(flat(q), flat(k), flat(v)).device.type == "meta"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    tensors = qkv((6, 7), grad=True)

    def function(*x):
        return vicus.na2d(*x, 3).sin()

    output = checkpoint(function, *tensors, use_reentrant=use_reentrant)
    ours, theirs = (
        torch.autograd.grad(x.sum(), tensors) if not use_reentrant else None for x in (output, function(*tensors))
    )
    if use_reentrant:  # takes no torch.autograd.grad
        output.sum().backward()
        ours = [x.grad for x in tensors]
        theirs = torch.autograd.grad(function(*tensors).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_forward_mode_equals_finite_differences(caplog):
    tensors = qkv((4, 5), dtype=torch.float64)
    directions = qkv((4, 5), dtype=torch.float64, seed=3)

    def function(*x):
        output, logsumexp = vicus.na2d(*x, 3, return_lse=True)
        dense, dense_lse = vicus.attention(*map(flat, x), is_causal=True, return_lse=True)
        merged = vicus.merge_attentions([flat(output), dense], [logsumexp.flatten(1, 2), dense_lse])
        return torch.cat([merged[0].flatten(), merged[1].flatten()])

    with caplog.at_level("DEBUG", logger="vicus"), forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, d) for x, d in zip(tensors, directions, strict=True)]
        tangent = forward_ad.unpack_dual(function(*dual)).tangent
    assert "forward-mode" in caplog.text
    step = 1e-6
    ahead, behind = (function(*(x + s * d for x, d in zip(tensors, directions, strict=True))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_torch_func():
    tensors = qkv((4, 5), dtype=torch.float64)
    direction = torch.randn_like(tensors[0])

    def loss(*x):
        return vicus.na2d(*x, 3).sin().sum() + vicus.attention(*map(flat, x)).cos().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(a, b)
    _, tangent = torch.func.jvp(lambda q: loss(q, *tensors[1:]), (tensors[0],), (direction,))
    torch.testing.assert_close(tangent, (expected[0] * direction).sum())


def test_vmap():
    stacked = [torch.stack(x) for x in zip(*(qkv((4, 5), seed=i) for i in range(3)), strict=True)]

    def function(*x):
        return vicus.na2d(*x, 3)

    expected = torch.stack([function(*x) for x in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*stacked), expected)


def test_deterministic_gradients_are_bit_identical():
    tensors = qkv((12, 13), grad=True)
    for arguments in ({"deterministic": True}, {"deterministic": False}, {}):
        runs = [torch.autograd.grad(vicus.na2d(*tensors, 5, **arguments).square().sum(), tensors) for _ in range(2)]
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


def test_many_threads():
    tensors = qkv((9, 9), heads=8)
    expected = {w: vicus.na2d(*tensors, w) for w in (2, 3, 5)}
    failures = []

    def work(seed):
        for i in range(20):
            window = (2, 3, 5)[(seed + i) % 3]
            leaves = [x.clone().requires_grad_(seed % 2 == 0) for x in tensors]
            output = vicus.na2d(*leaves, window)
            if seed % 2 == 0:
                output.sum().backward()
            if not torch.equal(output, expected[window]):
                failures.append((seed, window))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


class Attended(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return vicus.na2d(*(x[0] for x in qkv((1, 6, 6), batch=1, seed=index)), 3)


def test_workers_of_a_data_loader():
    vicus.na2d(*qkv((24, 24), heads=8, dim=32), 7)  # threads exist before the workers are forked
    loader = torch.utils.data.DataLoader(Attended(), batch_size=2, num_workers=2, timeout=60)
    batches = list(loader)
    torch.testing.assert_close(torch.cat(batches), torch.stack([Attended()[i] for i in range(8)]))


def test_torch_threads_are_used():
    before = torch.get_num_threads()
    tensors = qkv((24, 24), heads=8, dim=32, dim_v=32)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert vicus.info()["threads"] == count
            results.append(vicus.na2d(*tensors, 7))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_functions_pickle_and_copy():
    for function in (vicus.na1d, vicus.na2d, vicus.na3d, vicus.neighborhood_attention, vicus.attention):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
        assert function.__module__ == "vicus.functional"


# --- The quick way ---------------------------------------------------------------------------------------------------


def test_quick_way_takes_only_what_it_has_seen(monkeypatch):
    calls = []
    inference = _ops.neighborhood_inference
    monkeypatch.setattr(_attend, "neighborhood", lambda *a, _real=_attend.neighborhood: calls.append(a) or _real(*a))
    tensors = qkv((6, 7))
    window = (3, 3)
    for _ in range(3):
        functional.na2d(*tensors, window)
    assert len(calls) == 1 and inference is _ops.neighborhood_inference
    for bad in ((3.0, 3.0), (3, True), "33"):
        with pytest.raises(ValueError, match="kernel_size"):
            functional.na2d(*tensors, bad)
    for bad in ((0, 0), (1, 0), 1):
        with pytest.raises(ValueError, match="is_causal"):
            functional.na2d(*tensors, window, 1, 1, bad)
    with pytest.raises(ValueError, match="kernel_size"):
        functional.na2d(*(x[:, :2] for x in tensors), window)
    with pytest.raises(ValueError, match="key"):
        functional.na2d(tensors[0], tensors[1][:, :4], tensors[2], window)


@pytest.fixture
def long_way(monkeypatch):
    """Collects the calls that take it; nothing is remembered yet."""
    monkeypatch.setattr(_quick, "_seen", {})
    calls = []
    for name in ("neighborhood", "dense"):
        real = getattr(_attend, name)
        monkeypatch.setattr(_attend, name, lambda *a, _real=real: calls.append(a) or _real(*a))
    return calls


def test_quick_way_with_gradients(long_way):
    window = (3, 3)
    found = []
    for _ in range(2):
        q, k, v = (x.requires_grad_() for x in qkv((6, 7)))
        output = functional.na2d(q, k, v, window)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        found.append((output, *torch.autograd.grad((output * weights).sum(), (q, k, v))))
    assert len(long_way) == 1
    assert all(map(torch.equal, *found))
    q, k, v = (x.flatten(1, 2) for x in qkv((6, 7)))
    k.requires_grad_()
    functional.attention(q, k, v).sum().backward()
    assert len(long_way) == 1 and k.grad.isfinite().all()


def test_quick_way_twice_differentiated(long_way):
    shape = {"batch": 1, "heads": 2, "heads_kv": 1, "dim": 3, "dim_v": 2}
    q, k, v = qkv((3, 2), dtype=torch.float64, grad=True, **shape)
    window = (3, 2)
    functional.na2d(q, k, v, window)
    assert torch.autograd.gradgradcheck(lambda *x: functional.na2d(*x, window), (q, k, v))
    assert len(long_way) == 1


def test_quick_way_leaves_switches_to_the_long_one(long_way):
    q, k, v = (x.requires_grad_() for x in qkv((6, 7)))
    window = (3, 3)
    functional.na2d(q, k, v, window)
    long_way.clear()
    with context.use_deterministic_algorithms():
        functional.na2d(q, k, v, window)
        functional.attention(*(x.flatten(1, 2) for x in (q, k, v)))
    with context.use_kv_parallelism_in_fused_na(False):
        functional.na2d(q, k, v, window)
    functional.na2d(q, k, v, window, deterministic=True)
    assert len(long_way) == 4
    functional.na2d(q, k, v, window, deterministic=False)
    assert len(long_way) == 4


@pytest.mark.parametrize("head_dim", [64, 513])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_quick_way_on_a_gpu_is_for_what_its_engine_takes(monkeypatch, request, head_dim, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_CAPABILITIES", {})
    _quick._gpu_head_dim.cache_clear()
    monkeypatch.setattr(_quick, "_seen", {})
    request.addfinalizer(_quick._gpu_head_dim.cache_clear)
    window, rule = (3, 3), (2, True)
    given = (window, 1, 1, False)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 6, 7, 2, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        _quick.remember(rule, q, given, [[3, 3], [1, 1], [1, 1], [0, 0]])
        taken = _quick.neighborhood(rule, q, k, v, *given, None)
        flat_q, flat_k, flat_v = (x.flatten(1, 2) for x in (q, k, v))
        dense = _quick.dense(flat_q, flat_k, flat_v, False, None)
        assert _quick.neighborhood(rule, q, k.cpu(), v, *given, None) is None
        assert _quick.dense(flat_q, flat_k, flat_v.cpu(), False, None) is None
    takes = head_dim <= 512 and capability >= (8, 0)
    assert (taken is not None) == takes and (dense is not None) == takes


def test_remembered_masks_are_bounded():
    for height, width in itertools.product(range(2, 40), range(2, 40)):
        x = torch.empty(0, height, width, 1, 1)
        functional.na2d(x, x, x, 2)
    assert len(_quick._seen) <= _quick._MOST_SEEN

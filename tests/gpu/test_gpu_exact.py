"""What must hold to the bit: the same result in every run, nothing from outside a window, nothing written beside an
output, the same result from a CUDA graph."""

import contextlib
import dataclasses
import math

import gpu_oracle
import pytest
import torch
from gpu_check import backward, check, forward, inference
from gpu_problems import Case, dense, neighborhood, tensors
from gpu_support import alone, device_bytes, needs_gpu

pytestmark = needs_gpu
RUNS = 20
PROBLEMS = {
    "2d": neighborhood((56, 56), 7, heads=4, batch=4),
    "2d more": neighborhood((40, 41), (9, 6), (2, 1), (1, 2), (1, 0), heads=6, kv=2, additional_tokens=9, rpb=True),
    "3d": neighborhood((8, 16, 16), (3, 7, 7), heads=4, dim=32, dtype="float16"),
    "1d": neighborhood((3000,), 256, heads=4, kv=1, dim=128, causal=1),
    "dense": dense(1024, 1024, "top_left", heads=8, kv=2, dim=128),
    "dense wide": dense(700, 900, heads=4, dim=256, dtype="float16"),
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def case_of(name):
    return Case(name, PROBLEMS[name], seed=7)


@each_problem
def test_every_run_gives_the_same_bits(name):
    p, t = PROBLEMS[name], tensors(case_of(name))
    saved = forward(p, t)
    grads = backward(p, t, saved, True)
    for _ in range(RUNS - 1):
        again = forward(p, t)
        assert all(torch.equal(x, y) for x, y in zip(saved, again, strict=True))
        for key, x in backward(p, t, saved, True).items():
            assert torch.equal(x, grads[key]), key


def spoiled(p, t, token, value):
    """The tensors with one key of the first batch entry replaced, and which queries see that key."""
    made = dict(t)
    for name in ("key", "value"):
        made[name] = t[name].clone()
        made[name][0].reshape(p.keys, p.heads_kv, -1)[token] = value
    seen = torch.zeros(p.batch, p.queries, dtype=torch.bool, device="cuda")
    seen[0] = gpu_oracle.seen_table(p, "cuda")[:, token]
    return made, seen


def assert_as_before(got, output):
    """Rows near a value that is not finite are computed again in another order: equal but for rounding."""
    finite = output.isfinite()
    assert torch.equal(got[~finite], output[~finite])
    unit = torch.finfo(output.dtype).eps
    got, output = got[finite].double(), output[finite].double()
    assert ((got - output).abs() <= 4 * unit * output.abs().clamp(min=float(output.abs().mean()))).all()


@each_problem
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_keys_outside_a_window_have_no_influence(name, value):
    p = PROBLEMS[name]
    if p.dense and p.mask.causal == "none":
        p = dense(700, 900, left=100, right=50, heads=4, dim=256, dtype="float16")
    t = tensors(Case(name, p, seed=3))
    t["grad_logsumexp"] = None
    output, logsumexp = forward(p, t)
    for token in (0, p.keys // 2, p.keys - 1):
        bad, seen = spoiled(p, t, token, value)
        got, got_lse = forward(p, bad)
        blind = ~seen
        assert blind.any()
        flat = [x.reshape(p.batch, p.queries, p.heads, -1) for x in (output, got, logsumexp, got_lse)]
        assert_as_before(flat[1][blind], flat[0][blind])
        assert_as_before(flat[3][blind], flat[2][blind])
        # Queries that do see it may have any result; they send no gradient, so nobody else's is spoiled.
        silent = dict(bad, grad_output=bad["grad_output"].clone())
        silent["grad_output"].reshape(p.batch, p.queries, p.heads, -1)[seen] = 0
        grads = backward(p, silent, (output, logsumexp), True)
        query = grads["query"].reshape(p.batch, p.queries, p.heads, -1)
        assert torch.isfinite(query[blind]).all()


def test_a_query_of_nan_spoils_no_other():
    p = PROBLEMS["2d"]
    t = tensors(case_of("2d"))
    output, _ = forward(p, t)
    bad = dict(t, query=t["query"].clone())
    bad["query"][1, 20, 30, 2] = math.nan
    got, _ = forward(p, bad)
    assert got[1, 20, 30, 2].isnan().all()
    got[1, 20, 30, 2] = output[1, 20, 30, 2]
    assert_as_before(got, output)


@contextlib.contextmanager
def allocations():
    """Addresses and sizes in bytes of what PyTorch's allocator is asked for in the meantime."""
    taken = []
    torch.cuda.memory._record_memory_history(context=None)
    try:
        yield taken
        traces = torch.cuda.memory._snapshot()["device_traces"]
        taken += [(e["addr"], e["size"]) for trace in traces for e in trace if e["action"] == "alloc"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@alone
@each_problem
@pytest.mark.parametrize("deterministic", [True, False])
def test_nothing_is_written_beside_outputs(name, deterministic):
    """Outputs and scratch are cut from one block of known bytes; what of it is not theirs must keep them."""
    p = dataclasses.replace(PROBLEMS[name], batch=8)
    t = tensors(Case(name, p, seed=7))
    kept = [x.clone() for x in forward(p, t)]
    backward(p, t, kept, deterministic)  # compiled by now
    size, pattern = 1 << 27, 0xA5
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        block = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(pattern)
        start = block.data_ptr()
        del block  # the pool keeps it, and cuts from it what is asked for next
        with allocations() as taken:
            outputs = [*forward(p, t), *backward(p, t, kept, deterministic).values()]
    mine, inside = torch.zeros(size, dtype=torch.bool, device="cuda"), 0
    for address, count in taken:
        if 0 <= (first := address - start) < size:
            inside += 1
            mine[first : first + count] = True
    asked = dict(taken)
    assert all(asked[x.data_ptr()] == x.numel() * x.element_size() for x in outputs if x.data_ptr() in asked)
    assert inside >= 4, "the pool took the outputs from elsewhere"
    intact = bool((device_bytes(start, size)[~mine] == pattern).all())
    assert intact


@each_problem
def test_replayed_from_a_graph(name):
    p, t = PROBLEMS[name], tensors(case_of(name))
    saved = forward(p, t)
    grads = backward(p, t, saved, True)  # every kernel is loaded by now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(p, t)
        captured_grads = backward(p, t, captured, True)
    other = tensors(dataclasses.replace(case_of(name), seed=8))
    for key, x in t.items():
        if x is not None and other[key] is not None:
            x.copy_(other[key])
    expected = forward(p, t)
    expected_grads = backward(p, t, expected, True)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
    assert all(torch.equal(captured_grads[key], expected_grads[key]) for key in grads)
    assert not torch.equal(saved[0], expected[0])


def test_compiling_in_a_capture_is_refused_in_words():
    p = neighborhood((37, 41), (5, 3), heads=2, dim=56)
    t = tensors(Case("new", p))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured into a CUDA graph"), torch.cuda.graph(graph):
        forward(p, t)
    assert check(Case("new", p)) <= 1  # and the device is well


@alone
@pytest.mark.parametrize("kind", ["neighborhood", "batch"])
def test_tensors_beyond_2_31_elements(kind):
    """Rows at both ends and around element 2^31, forward and backward, against the same rows computed alone."""
    heads, dim, window = 256, 128, 9
    if kind == "neighborhood":
        batch, tokens = 1, 70_000
        parts = [(0, 0, 40), (0, 65_500, 65_570), (0, tokens - 40, tokens)]
    else:
        batch, tokens = 1100, 64
        parts = [(0, 0, tokens), (1024, 0, tokens), (batch - 1, 0, tokens)]
    p = neighborhood((tokens,), window, heads=heads, dim=dim, batch=batch)
    assert batch * tokens * heads * dim > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 42e9:
        pytest.skip("needs 42 GB of device memory")
    shape = p.shape("query")
    t = {n: torch.randn(shape, dtype=torch.bfloat16, device="cuda") for n in ("query", "key", "value", "grad_output")}
    t["grad_logsumexp"] = None
    saved = forward(p, t)
    grads = backward(p, t, saved, True)
    for b, first, last in parts:
        # With a margin of windows on each side, rows in the middle have the keys they have in the whole.
        margin = 0 if kind == "batch" else 2 * window
        low, high = max(0, first - margin), min(tokens, last + margin)
        own = {n: x[b : b + 1, low:high].contiguous() for n, x in t.items() if x is not None}
        small = neighborhood((high - low,), window, heads=heads, dim=dim, batch=1)
        arriving = own.pop("grad_output")
        ref = gpu_oracle.compute(small, own, arriving)
        peer = gpu_oracle.compute(small, own, arriving, half=torch.bfloat16)
        got = {"output": saved[0], **grads}
        for name, x in got.items():
            mine, wanted, near = (
                y[:, first - low : last - low] for y in (x[b : b + 1, low:high], ref.values[name], peer.values[name])
            )
            error = float((mine.double() - wanted).abs().max())
            allowed = 2 * float((near.bfloat16().double() - wanted).abs().max()) + ref.noise[name]
            assert error <= allowed, (name, b, first, error, allowed)


@pytest.mark.parametrize("name", [name for name, p in PROBLEMS.items() if not p.rpb])
def test_inference_has_the_same_output(name):
    p, t = PROBLEMS[name], tensors(case_of(name))
    assert torch.equal(inference(p, t), forward(p, t)[0])

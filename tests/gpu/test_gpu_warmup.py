"""`vicus.warmup` and CUDA graphs on a real GPU. Every test has problems of its own: what one loads, the others lack."""

import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import vicus  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16]


def make(*shape, dtype=torch.float16):
    torch.manual_seed(0)
    return [torch.randn(*shape, device="cuda", dtype=dtype) for _ in range(3)]


def captured(call):
    """A graph of the call, and where its result is."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_capture_without_warmup_raises_before_anything_is_queued(dtype):
    tensors = make(1, 20, 30, 2, 56, dtype=dtype)
    windows = (3, 29)  # that no other test has
    with pytest.raises(RuntimeError, match=r"vicus\.warmup"):
        captured(lambda: vicus.na2d(*tensors, kernel_size=windows))
    assert torch.isfinite(vicus.na2d(*tensors, kernel_size=windows)).all(), "the process goes on"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_capture_after_warmup_replays(dtype):
    tensors = make(2, 20, 30, 2, 72, dtype=dtype)
    vicus.warmup(vicus.na2d, *tensors, kernel_size=5, return_lse=True)
    graph, (output, lse) = captured(lambda: vicus.na2d(*tensors, kernel_size=5, return_lse=True))
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in tensors:
            tensor.normal_()
        graph.replay()
        wanted, wanted_lse = vicus.na2d(*tensors, kernel_size=5, return_lse=True)
        assert torch.equal(output, wanted)
        assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("deterministic", [True, False])
def test_forward_and_backward_in_a_graph(deterministic):
    tensors = [x.requires_grad_() for x in make(2, 300, 2, 88 if deterministic else 104)]
    upstream = torch.randn_like(tensors[0])

    def call(query, key, value):
        return vicus.na1d(query, key, value, kernel_size=31, deterministic=deterministic)

    def step():
        return torch.autograd.grad(call(*tensors), tensors, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        vicus.warmup(call, *tensors)
    torch.cuda.current_stream().wait_stream(side)
    assert all(x.grad is None for x in tensors)
    graph, gradients = captured(step)
    graph.replay()
    for found, wanted in zip(gradients, step(), strict=True):
        if deterministic:
            assert torch.equal(found, wanted)
        else:
            assert (found - wanted).abs().max() <= 4 * torch.finfo(found.dtype).eps * wanted.abs().max()


def test_alignment_is_part_of_the_call():
    tensors = make(1, 200, 2, 40)
    shifted = [x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in tensors]
    vicus.warmup(vicus.na1d, *tensors, kernel_size=93)
    with pytest.raises(RuntimeError, match=r"vicus\.warmup"):
        captured(lambda: vicus.na1d(*shifted, kernel_size=93))
    vicus.warmup(vicus.na1d, *shifted, kernel_size=93)
    graph, output = captured(lambda: vicus.na1d(*shifted, kernel_size=93))
    graph.replay()
    assert torch.equal(output, vicus.na1d(*shifted, kernel_size=93))


def test_warmup_belongs_before_the_capture():
    tensors = make(1, 100, 2, 48)
    with pytest.raises(RuntimeError, match="before the capture"):
        captured(lambda: vicus.warmup(vicus.na1d, *tensors, kernel_size=9))


def test_a_layer_in_a_graph():
    layer = vicus.NeighborhoodAttention2D(embed_dim=96, num_heads=4, kernel_size=5).cuda().half()
    x = torch.randn(1, 24, 24, 96, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        vicus.warmup(layer, x)
        torch.cuda.synchronize()
        graph, output = captured(lambda: layer(x))
        graph.replay()
        assert torch.equal(output, layer(x))


def test_time_of_first_and_later_calls(record_property):
    """For the record, in the report: nothing is asserted of times."""
    tensors = make(1, 20, 30, 2, 120)
    start = time.perf_counter()
    vicus.warmup(vicus.na2d, *tensors, kernel_size=5)
    torch.cuda.synchronize()
    record_property("first_call_seconds", time.perf_counter() - start)
    rounds = 1000
    for _ in range(10):
        output = vicus.na2d(*tensors, kernel_size=5)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        output = vicus.na2d(*tensors, kernel_size=5)
    record_property("host_microseconds_a_call", (time.perf_counter() - start) / rounds * 1e6)
    torch.cuda.synchronize()
    assert torch.isfinite(output).all()

"""Several streams, threads and devices at a time; calls return before their work is done."""

import concurrent.futures
import threading

import pytest
import torch
from gpu_check import backward, forward
from gpu_problems import Case, dense, neighborhood, tensors
from gpu_support import PRESENT, alone, needs_gpu

pytestmark = needs_gpu
P2D = neighborhood((48, 48), 7, heads=4, batch=2)
DENSE = dense(800, 800, "top_left", heads=4, dim=128)


def everything(p, t):
    saved = forward(p, t)
    return [*saved, *backward(p, t, saved, True).values()]


def same(ours, theirs):
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_work_is_queued_on_the_current_stream():
    """Inputs are ready only when an earlier, slow kernel of that stream is done."""
    for p in (P2D, DENSE):
        t = tensors(Case("stream", p, seed=2))
        expected = everything(p, t)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        late = {name: None if x is None else torch.zeros_like(x) for name, x in t.items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            for name, x in t.items():
                if x is not None:
                    late[name].copy_(x)
            found = everything(p, late)
        stream.synchronize()
        assert same(found, expected)


@alone
def test_calls_do_not_wait_for_the_device():
    t = tensors(Case("queued", P2D, seed=2))
    everything(P2D, t)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second and more
    done = torch.cuda.Event()
    everything(P2D, t)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_many_streams():
    sets = [tensors(Case("many", P2D, seed=seed)) for seed in range(8)]
    expected = [everything(P2D, t) for t in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    found = []
    for _ in range(5):
        for t, stream in zip(sets, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(everything(P2D, t))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert same(results, expected[i % len(sets)])


@alone
def test_many_threads_need_the_same_new_kernels():
    """Eight threads, each with a stream, call problems that nobody compiled yet."""
    problems = [neighborhood((30, 30), window, heads=2, dim=24) for window in (3, 5, 7)] + [dense(200, 200, dim=24)]
    sets = [tensors(Case("threads", p, seed=4)) for p in problems]
    torch.cuda.synchronize()
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            order = [(i + number) % len(problems) for i in range(len(problems))]
            found = {i: everything(problems[i], sets[i]) for i in order}
            torch.cuda.current_stream().synchronize()
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for i, (p, t) in enumerate(zip(problems, sets, strict=True)):
        expected = everything(p, t)
        assert all(same(found[i], expected) for found in results)


@pytest.mark.skipif(PRESENT and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    """The device is that of the tensors, whatever the current one is."""
    first = tensors(Case("devices", P2D, seed=5))
    expected = everything(P2D, first)
    second = {name: None if x is None else x.to("cuda:1") for name, x in first.items()}
    found = everything(P2D, second)
    assert all(x.device.index == 1 for x in found)
    assert same([x.to("cuda:0") for x in found], expected)

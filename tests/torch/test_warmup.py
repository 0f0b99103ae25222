"""`vicus.warmup` where nothing has to be compiled: it makes the call, forward and backward, and leaves no trace."""

import pytest
import torch

import vicus


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(1, 6, 7, 2, 8) for _ in range(3)]


class Recorder:
    """A function that counts its calls and the gradients that reach its first argument."""

    def __init__(self, function):
        self.function = function
        self.calls = self.gradients = 0

    def __call__(self, query, *args, **kwargs):
        self.calls += 1
        query = query.view_as(query)
        if query.requires_grad:
            query.register_hook(self.count)
        return self.function(query, *args, **kwargs)

    def count(self, _):
        self.gradients += 1


@pytest.mark.parametrize("return_lse", [False, True])
def test_forward_only(tensors, return_lse):
    recorder = Recorder(vicus.na2d)
    assert vicus.warmup(recorder, *tensors, 3, return_lse=return_lse) is None
    assert (recorder.calls, recorder.gradients) == (1, 0)


@pytest.mark.parametrize("return_lse", [False, True])
def test_backward_where_gradients_are_required(tensors, return_lse):
    query = tensors[0].requires_grad_()
    recorder = Recorder(vicus.na2d)
    vicus.warmup(recorder, query, key=tensors[1], value=tensors[2], kernel_size=3, return_lse=return_lse)
    assert (recorder.calls, recorder.gradients) == (1, 1)
    assert query.grad is None
    with torch.no_grad():
        vicus.warmup(recorder, *tensors, 3)
    assert (recorder.calls, recorder.gradients) == (2, 1)


def test_a_module(tensors):
    layer = vicus.NeighborhoodAttention2D(embed_dim=16, num_heads=2, kernel_size=3)
    reached = []
    for parameter in layer.parameters():
        parameter.register_hook(reached.append)
    vicus.warmup(layer, tensors[0].flatten(-2))
    assert len(reached) == len(list(layer.parameters()))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_errors_are_those_of_the_call(tensors):
    with pytest.raises(ValueError, match="kernel_size"):
        vicus.warmup(vicus.na2d, *tensors, 0)

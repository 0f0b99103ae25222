"""Arrays in awkward places: slices of larger buffers, permuted, reversed, broadcast; guards around what is written."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
STYLES = ("contiguous", "offset", "sliced", "permuted", "reversed")
INPUT_STYLES = (*STYLES, "broadcast")
# All bits set is a NaN in every type: memory outside a view poisons whoever reads it, and shows who writes it.
POISON = 0xFF


def place(shape, dtype, style, rng):
    """A view of `shape` in a poisoned buffer, and the buffer. The last dimension is contiguous in every style."""
    shape, lead = tuple(shape), len(shape) - 1
    order = list(range(lead))
    before, after, guard = [0] * len(shape), [0] * len(shape), 0
    if style != "contiguous":
        guard = int(rng.integers(1, 67))
    if style == "permuted":
        rng.shuffle(order)
    if style in ("sliced", "permuted", "reversed"):
        before = [int(rng.integers(0, 3)) for _ in shape]
        after = [int(rng.integers(0, 3)) for _ in shape]
        before[-1], after[-1] = int(rng.integers(0, 9)), int(rng.integers(0, 9))
    order.append(lead)
    extents = [before[d] + shape[d] + after[d] for d in order]
    count = int(np.prod(extents))
    buffer = np.full((count + 2 * guard) * dtype.itemsize, POISON, np.uint8).view(dtype)
    memory = buffer[guard : guard + count].reshape(extents)
    memory = memory[tuple(slice(before[d], before[d] + shape[d]) for d in order)]
    view = memory.transpose([order.index(d) for d in range(len(shape))])
    if style == "reversed":
        view = view[
            tuple(slice(None, None, -1) if d < lead and rng.random() < 0.6 else slice(None) for d in range(lead))
        ]
    return view, buffer


def put(values, dtype, style, rng):
    """An input with these values, as far as the style allows: a broadcast axis repeats its first entry."""
    values = np.asarray(values).astype(dtype)
    if style != "broadcast":
        view, _ = place(values.shape, dtype, style, rng)
        view[...] = values
        return view
    repeated = tuple(d < values.ndim - 1 and n > 0 and rng.random() < 0.4 for d, n in enumerate(values.shape))
    small = values[tuple(slice(0, 1) if r else slice(None) for r in repeated)]
    view, _ = place(small.shape, dtype, "sliced", rng)
    view[...] = small
    return np.broadcast_to(view, values.shape)


class Output:
    """Memory to be written whole and nowhere else."""

    def __init__(self, shape, dtype, style, rng):
        self.view, self._buffer = place(shape, dtype, style, rng)
        marks = np.zeros(self._buffer.size, bool)
        offset = self.view.ctypes.data - self._buffer.ctypes.data
        if self.view.size:
            strides = tuple(s // dtype.itemsize for s in self.view.strides)
            first = np.lib.stride_tricks.as_strided(
                marks[offset // dtype.itemsize :], self.view.shape, strides, writeable=True
            )
            first[...] = True
        self._outside = ~marks

    def bytes(self):
        return self.view.tobytes()

    def check_guards(self, what):
        around = self._buffer[self._outside].view(np.uint8)
        assert np.all(around == POISON), f"{what}: memory outside the view was written"

    def check_untouched(self, what):
        assert np.all(self._buffer.view(np.uint8) == POISON), f"{what} was written"

"""Every rule on arguments: the error names the argument, what it was and what is allowed, and nothing is written."""

import re

import bridge
import memory
import numpy as np
import pytest
from oracle import Dense, Neighborhood, Problem


def windowed(**changes):
    mask = {"kernel_size": [3, 5], "stride": [1, 2], "dilation": [1, 1], "is_causal": [0, 1]}
    mask |= {k: changes.pop(k) for k in list(changes) if k in mask}
    json = bridge.problem_json(Problem([6, 7], 4, 2, 8, 6, Neighborhood(**mask), batch=2))
    return json | changes


def dense(**changes):
    mask = {k: changes.pop(k) for k in list(changes) if k in Dense.__dataclass_fields__}
    json = bridge.problem_json(Problem([6], 4, 2, 8, 6, Dense(**({"keys": 9} | mask)), batch=2))
    return json | changes


def expect(argument, operation, request, arrays=None):
    with pytest.raises(bridge.VicusError) as caught:
        bridge.call(operation, request, arrays)
    error = caught.value
    assert error.kind == "InvalidArgument", error.text
    assert re.fullmatch(argument, error.argument), f"names {error.argument!r}, not {argument!r}: {error.text}"
    assert re.fullmatch(re.escape(error.argument) + r" is [^\n]+; allowed: [^\n]+", error.text), error.text
    return error


BAD_PROBLEMS = [
    ("batch", windowed(batch=-1)),
    ("layout", windowed(layout=[])),
    (r"layout(\[0\])?", windowed(layout=[-1, 4])),
    ("heads", windowed(heads=0)),
    ("heads", windowed(heads=-4)),
    ("heads_kv", windowed(heads_kv=3)),
    ("heads_kv", windowed(heads_kv=-2)),
    ("heads_kv", windowed(heads_kv=8)),
    ("head_dim", windowed(head_dim=0)),
    ("head_dim", windowed(head_dim=-8)),
    ("head_dim_v", windowed(head_dim_v=-1)),
    ("additional_tokens", windowed(additional_tokens=-1)),
    ("attn_bias", windowed(attn_bias=True)),
    (r"kernel_size\[0\]", windowed(kernel_size=[0, 5])),
    (r"kernel_size\[1\]", windowed(kernel_size=[3, -5])),
    ("kernel_size", windowed(kernel_size=[])),
    ("kernel_size", windowed(kernel_size=[3, 3, 3])),
    (r"stride\[1\]", windowed(stride=[1, 6])),
    (r"stride\[0\]", windowed(stride=[0, 1])),
    ("stride", windowed(stride=[1, 1, 1])),
    (r"dilation\[0\]", windowed(dilation=[0, 1])),
    (r"dilation\[1\]", windowed(dilation=[1, -2])),
    ("dilation", windowed(dilation=[1, 1, 1])),
    (r"is_causal\[1\]", windowed(is_causal=[0, 2])),
    (r"is_causal\[0\]", windowed(is_causal=[-1, 0])),
    ("is_causal", windowed(is_causal=[0, 0, 0])),
    ("layout", dense(layout=[6, 6])),
    (r"(mask\.)?keys|key_length", dense(keys=-1)),
    ("rpb", dense(rpb=True)),
    ("window_left", dense(window_left=-2)),
    ("window_right", dense(window_right=-7)),
    ("window_right", dense(causal="top_left", window_right=1)),
    ("window_right", dense(causal="bottom_right", window_right=3)),
    ("key_lengths", dense(key_lengths=[3])),
    (r"key_lengths\[1\]", dense(key_lengths=[3, 10])),
    (r"key_lengths\[0\]", dense(key_lengths=[-1, 3])),
    ("batch|cumulative_queries", dense(cumulative_queries=[0, 6], cumulative_keys=[0, 9])),
    ("attn_bias", dense(batch=1, attn_bias=True, cumulative_queries=[0, 6], cumulative_keys=[0, 9])),
    (
        "key_lengths|cumulative_queries",
        dense(batch=1, key_lengths=[3], cumulative_queries=[0, 6], cumulative_keys=[0, 9]),
    ),
    (r"cumulative_keys(\[0\])?", dense(batch=1, cumulative_queries=[0, 6])),
    (r"cumulative_queries(\[0\])?", dense(batch=1, cumulative_keys=[0, 9])),
    ("cumulative_keys", dense(batch=1, cumulative_queries=[0, 2, 6], cumulative_keys=[0, 9])),
    (r"cumulative_queries\[0\]", dense(batch=1, cumulative_queries=[1, 6], cumulative_keys=[0, 9])),
    (r"cumulative_queries\[2\]", dense(batch=1, cumulative_queries=[0, 4, 2, 6], cumulative_keys=[0, 1, 2, 9])),
    (r"cumulative_queries\[1\]", dense(batch=1, cumulative_queries=[0, 5], cumulative_keys=[0, 9])),
    (r"cumulative_keys\[0\]", dense(batch=1, cumulative_queries=[0, 6], cumulative_keys=[-1, 9])),
    (r"cumulative_keys\[2\]", dense(batch=1, cumulative_queries=[0, 4, 5, 6], cumulative_keys=[0, 5, 2, 9])),
    (r"cumulative_keys\[1\]", dense(batch=1, cumulative_queries=[0, 6], cumulative_keys=[0, 10])),
    (r"cumulative_queries(\[0\])?", dense(batch=1, cumulative_queries=[0], cumulative_keys=[0])),
]


@pytest.mark.parametrize("argument,problem", BAD_PROBLEMS, ids=[f"{i}-{x[0]}" for i, x in enumerate(BAD_PROBLEMS)])
def test_problem(argument, problem):
    expect(argument, "validate", {"problem": problem})
    expect(argument, "plan", {"problem": problem, "options": {"engine": "cpu"}})


def test_the_problems_above_are_one_change_away_from_legal():
    for problem in (windowed(), dense(), dense(batch=1, cumulative_queries=[0, 6], cumulative_keys=[0, 9])):
        bridge.call("validate", {"problem": problem})


@pytest.mark.parametrize(
    "argument,options",
    [
        ("threads", {"threads": -1}),
        ("rows", {"rows": 17}),
        ("rows", {"rows": -16}),
        (r"tile_q(\[\d\])?", {"tile_q": [0, -1, 4]}),
        (r"tile_q(\[\d\])?", {"tile_q": [1, 100, 100]}),
        (r"tile_q(\[\d\])?|rows", {"tile_q": [1, 8, 8], "rows": 16}),
        ("engine", {"engine": "gpu"}),
    ],
)
def test_options(argument, options):
    expect(argument, "plan", {"problem": windowed(), "options": {"engine": "cpu"} | options})


def test_more_than_three_values_and_unknown_names():
    expect(r".+", "validate", {"problem": windowed(kernel_size=[3, 3, 3, 3])})
    expect(r".+", "validate", {"problem": windowed(layout=[3, 3, 3, 3])})
    expect("dtype", "validate", {"problem": windowed(dtype="float8")})
    expect(r".+", "limit_cpu_target", {"name": "AVX9"})


# --- Tensors ---------------------------------------------------------------------------------------------------------

FULL = Problem([4, 5], 4, 2, 8, 6, Neighborhood([3, 3], [1, 1], [1, 1], [0, 0]), "float32", 2, None, 3, rpb=True)
BIASED = Problem([4], 4, 2, 8, 6, Dense(5), "float32", 2, attn_bias=True)


def arrays_of(problem, backward):
    """Inputs, and the outputs to be watched."""
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if problem.additional_tokens else []
    names += ["rpb"] if problem.rpb else []
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal(problem.shape(n)).astype(np.float32) for n in names}
    if problem.attn_bias:
        inputs["attn_bias"] = np.zeros((1, problem.heads, problem.queries, problem.keys), np.float32)
    if backward:
        inputs["output"] = np.zeros(problem.shape("output"), np.float32)
        inputs["grad_output"] = np.zeros(problem.shape("output"), np.float32)
        inputs["logsumexp"] = np.zeros(problem.shape("logsumexp"), np.float32)
        inputs["grad_logsumexp"] = np.zeros(problem.shape("logsumexp"), np.float32)
        written = {"d_" + n: problem.shape(n) for n in names}
    else:
        written = {"output": problem.shape("output"), "logsumexp": problem.shape("logsumexp")}
    outputs = {n: memory.Output(shape, np.dtype(np.float32), "contiguous", rng) for n, shape in written.items()}
    return inputs, outputs


def absent(view):
    return None


def one_wider(view):
    view.shape[-1] += 1
    return view


def one_shorter(view):
    view.shape[0] -= 1
    return view


def one_dimension_less(view):
    view.shape, view.strides = view.shape[1:], view.strides[1:]
    return view


def half(view):
    view.dtype = "float16"
    return view


def column(view):
    view.strides[-1] = 2
    return view


def overlapping(view):
    view.strides[-2] = view.shape[-1] - 1
    return view


def all_in_one(view):
    view.strides = [0] * (len(view.strides) - 1) + [1]
    return view


SHAPES = (one_wider, one_shorter, one_dimension_less)
WRONG_INPUTS = {
    "query": (absent, half, column, *SHAPES),
    "key": (absent, half, column, *SHAPES),
    "value": (absent, half, column, *SHAPES),
    "additional_keys": (absent, half, column, *SHAPES),
    "additional_values": (absent, half, column, *SHAPES),
    "rpb": (absent, half, *SHAPES),
    "grad_output": (absent, half, column, *SHAPES),
    "grad_logsumexp": (half, *SHAPES),
}
WRONG_OUTPUTS = (half, column, overlapping, all_in_one, *SHAPES)


def spoilt_calls():
    for backward in (False, True):
        inputs, outputs = arrays_of(FULL, backward)
        for name, wrong in WRONG_INPUTS.items():
            if name in inputs:
                yield from ((FULL, backward, name, change) for change in wrong)
        if backward:
            saved = (("output", (absent, half, column, *SHAPES)), ("logsumexp", (absent, half, *SHAPES)))
            yield from ((FULL, backward, name, change) for name, wrong in saved for change in wrong)
        else:
            yield FULL, backward, "output", absent
        for name in outputs:
            yield from ((FULL, backward, name, change) for change in WRONG_OUTPUTS)
        yield from ((BIASED, backward, "attn_bias", change) for change in (absent, *SHAPES))


def call_id(x):
    return {True: "backward", False: "forward"}[x] if isinstance(x, bool) else getattr(x, "__name__", str(x)[:20])


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("problem,backward,name,change", list(spoilt_calls()), ids=call_id)
def test_tensor(problem, backward, name, change, engine):
    inputs, outputs = arrays_of(problem, backward)
    views = {n: bridge.View(x) for n, x in inputs.items()} | {n: bridge.View(x.view) for n, x in outputs.items()}
    if change in (column, overlapping) and views[name].shape[-1] == 1:
        pytest.fail("this change says nothing here")
    views[name] = change(views[name])
    plain = name.removeprefix("d_")
    expect(
        rf"\w*[._]?{plain}(\.\w+)?(\[\d\])?",
        "backward" if backward else "forward",
        bridge.request(problem, engine=engine),
        views,
    )
    for watched, x in outputs.items():
        x.check_untouched(watched)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_calls_above_are_one_change_away_from_legal(backward, engine):
    for problem in (FULL, BIASED):
        inputs, outputs = arrays_of(problem, backward)
        views = {n: x.view for n, x in outputs.items()}
        bridge.call("backward" if backward else "forward", bridge.request(problem, engine=engine), inputs | views)


def test_gradient_of_what_is_not_there():
    plain = Problem([4, 5], 4, 2, 8, 6, FULL.mask, "float32", 2)
    inputs, outputs = arrays_of(plain, True)
    for name in ("rpb", "additional_keys", "additional_values"):
        extra = memory.Output(FULL.shape(name), np.dtype(np.float32), "contiguous", np.random.default_rng(0))
        views = {n: x.view for n, x in outputs.items()} | {"d_" + name: extra.view}
        expect(rf"\w*[._]?{name}.*", "backward", bridge.request(plain), inputs | views)
        for watched, x in (outputs | {name: extra}).items():
            x.check_untouched(watched)


def test_inputs_the_problem_does_not_ask_for():
    plain = Problem([4, 5], 4, 2, 8, 6, FULL.mask, "float32", 2)
    inputs, outputs = arrays_of(plain, False)
    more, _ = arrays_of(FULL, False)
    for name in ("rpb", "additional_keys", "additional_values"):
        views = {n: x.view for n, x in outputs.items()} | {name: more[name]}
        expect(rf"{name}.*", "forward", bridge.request(plain), inputs | views)
        for watched, x in outputs.items():
            x.check_untouched(watched)

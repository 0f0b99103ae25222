"""The global switches: values, exceptions, blocks, threads, and what a compiled caller sees of them."""

import itertools
import logging
import subprocess
import sys
import threading

import pytest
import torch

from vicus import _attend, _switches, context, na1d

# Setter, argument, getter, value of the getter by default and after the setter.
SWITCHES = [
    (context.use_fused_na, False, context.is_fused_na_enabled, True, False),
    (context.use_fna, False, context.is_fna_enabled, True, False),
    (context.use_kv_parallelism_in_fused_na, False, context.is_kv_parallelism_in_fused_na_enabled, True, False),
    (context.use_deterministic_algorithms, True, context.are_deterministic_algorithms_enabled, False, True),
    (
        context.set_memory_usage_preference,
        "strict",
        context.get_memory_usage_preference,
        context.MemoryUsagePreference.Default,
        context.MemoryUsagePreference.Strict,
    ),
    (context.set_memory_usage_preference, "unrestricted", context.is_memory_usage_unrestricted, False, True),
    (context.set_memory_usage_preference, "strict", context.is_memory_usage_strict, False, True),
    (context.set_memory_usage_preference, "strict", context.is_memory_usage_default, True, False),
    (context.allow_flex_compile, True, context.is_flex_compile_allowed, False, True),
    (context.use_autotuner, True, context.is_autotuner_enabled, False, True),
    (context.use_autotuner, True, context.is_autotuner_enabled_for_forward, False, True),
]
IDS = [f"{setter.__name__}-{getter.__name__}" for setter, _, getter, _, _ in SWITCHES]


@pytest.fixture(autouse=True)
def defaults():
    """Every test starts and ends with the defaults."""
    context.reset()
    yield
    context.reset()
    torch.use_deterministic_algorithms(False)


def in_thread(function):
    """What `function` returns in a thread of its own."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


@pytest.mark.parametrize(("setter", "argument", "getter", "default", "after"), SWITCHES, ids=IDS)
def test_plain_call_sets_for_the_process(setter, argument, getter, default, after):
    assert getter() == default
    setter(argument)
    assert getter() == after
    assert in_thread(getter) == after
    context.reset()
    assert getter() == default


@pytest.mark.parametrize(("setter", "argument", "getter", "default", "after"), SWITCHES, ids=IDS)
def test_block_sets_for_its_thread_and_restores(setter, argument, getter, default, after):
    with pytest.raises(KeyError), setter(argument):
        assert getter() == after
        assert in_thread(getter) == default
        raise KeyError
    assert getter() == default


def test_a_setter_sets_nothing_else():
    flags = [getter for _, _, getter, _, _ in SWITCHES]
    context.use_fused_na(False)
    assert context.is_kv_parallelism_in_fused_na_enabled()
    assert [getter() for getter in flags[2:]] == [default for _, _, _, default, _ in SWITCHES[2:]]


def test_blocks_nest():
    with context.set_memory_usage_preference("strict"):
        with context.set_memory_usage_preference("unrestricted"), context.use_fused_na(False):
            assert context.is_memory_usage_unrestricted()
            assert not context.is_fused_na_enabled()
        assert context.is_memory_usage_strict()
        assert context.is_fused_na_enabled()
    assert context.is_memory_usage_default()


def test_plain_call_in_a_block_ends_with_the_block():
    with context.set_memory_usage_preference("strict"):
        context.set_memory_usage_preference("unrestricted")
        context.use_fused_na(False)  # a switch without a block: for the process
        assert context.is_memory_usage_unrestricted()
        assert in_thread(context.is_memory_usage_default)
    assert context.is_memory_usage_default()
    assert not context.is_fused_na_enabled()


def test_a_setting_may_be_entered_again():
    strict = context.set_memory_usage_preference("strict")
    assert context.is_memory_usage_strict()
    with strict, strict:
        assert context.is_memory_usage_strict()
    assert context.is_memory_usage_default()
    with strict:
        assert context.is_memory_usage_strict()
    assert context.is_memory_usage_default()


def test_process_changes_reach_a_thread_inside_another_block():
    with context.use_fused_na(False):
        in_thread(lambda: (context.set_memory_usage_preference("strict"), None)[1])
        assert context.is_memory_usage_strict()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_settings_taken_back_in_any_order_leave_what_the_others_set(order):
    # As when three threads call a setter before any of them enters its block.
    names = ["strict", "unrestricted", "strict"]
    settings = [context.set_memory_usage_preference(name) for name in names]
    left = dict(enumerate(names))
    for index in order:
        with settings[index]:
            assert context.get_memory_usage_preference().name.lower() == names[index]
        del left[index]
        expected = left[max(left)] if left else "default"
        assert context.get_memory_usage_preference().name.lower() == expected


def test_forgotten_settings_take_no_memory():
    kept = [context.use_fused_na(False), context.use_fused_na(True)]
    for _ in range(50):
        context.set_memory_usage_preference("strict")
    assert len(_switches._writes) <= 2 * len(kept) + 2
    with kept[1]:
        pass
    assert not context.is_fused_na_enabled()
    assert context.is_memory_usage_strict()


def test_threads_do_not_disturb_each_other():
    wrong = []
    barrier = threading.Barrier(4)

    def work(name):
        barrier.wait()
        for _ in range(300):
            with context.set_memory_usage_preference(name):
                if context.get_memory_usage_preference().name.lower() != name:
                    wrong.append(name)

    names = ["strict", "unrestricted", "strict", "unrestricted"]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert context.is_memory_usage_default()


# --- What NATTEN promises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pref", ["Strict", "", None, 1, "none"])
def test_unknown_memory_preference(pref):
    with pytest.raises(ValueError, match=r"pref is .*'default', 'strict', 'unrestricted'"):
        context.set_memory_usage_preference(pref)
    assert context.is_memory_usage_default()


def test_memory_preference_takes_what_its_getter_returns():
    context.set_memory_usage_preference("strict")
    kept = context.get_memory_usage_preference()
    context.set_memory_usage_preference()
    assert context.is_memory_usage_default()
    context.set_memory_usage_preference(kept)
    assert context.is_memory_usage_strict()
    assert [p.value for p in context.MemoryUsagePreference] == [0, 1, 2]


def test_parallelism_is_an_error_in_deterministic_mode():
    context.use_kv_parallelism_in_fused_na(False)
    context.use_deterministic_algorithms()
    for setter in (context.use_kv_parallelism_in_fused_na, lambda mode: context.use_fused_na(True, mode)):
        with pytest.raises(RuntimeError, match="deterministic"):
            setter(True)
    assert not context.is_kv_parallelism_in_fused_na_enabled()
    context.use_deterministic_algorithms(False)
    context.use_kv_parallelism_in_fused_na()
    assert context.is_kv_parallelism_in_fused_na_enabled()


def test_parallelism_is_not_switched_on_in_pytorch_deterministic_mode(caplog):
    context.use_kv_parallelism_in_fused_na(False)
    torch.use_deterministic_algorithms(True)
    with caplog.at_level(logging.WARNING, logger="vicus"), context.use_kv_parallelism_in_fused_na(True):
        assert not context.is_kv_parallelism_in_fused_na_enabled()
    assert "torch.use_deterministic_algorithms" in caplog.text
    torch.use_deterministic_algorithms(False)
    assert not context.is_kv_parallelism_in_fused_na_enabled()


def test_nothing_is_printed_until_the_program_configures_logging():
    code = "import torch, vicus; torch.use_deterministic_algorithms(True); vicus.use_kv_parallelism_in_fused_na()"
    quiet = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert quiet.stdout + quiet.stderr == ""
    loud = subprocess.run(
        [sys.executable, "-c", f"import logging; logging.basicConfig(); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "WARNING:vicus:" in loud.stderr


def test_fused_na_sets_both_switches():
    with context.use_fused_na(False, kv_parallel=False):
        assert not context.is_fused_na_enabled()
        assert not context.is_kv_parallelism_in_fused_na_enabled()
    assert context.is_fused_na_enabled()
    assert context.is_kv_parallelism_in_fused_na_enabled()
    context.use_fused_na(True, False)
    assert not context.is_kv_parallelism_in_fused_na_enabled()


def test_flex_compile_guards():
    flags = lambda: (context.is_flex_compile_allowed(), context.is_flex_compile_backprop_allowed())  # noqa: E731
    assert flags() == (False, False)
    context.allow_flex_compile()
    assert flags() == (True, False)
    context.allow_flex_compile(backprop=True)
    assert flags() == (True, True)
    context.disable_flex_compile_backprop()
    assert flags() == (True, False)
    context.allow_flex_compile_backprop()
    assert flags() == (True, True)
    context.disable_flex_compile()
    assert flags() == (False, False)
    context.disable_flex_compile_backprop()
    assert flags() == (False, False)
    context.allow_flex_compile_backprop()  # nothing without the forward pass
    assert flags() == (False, False)
    context.allow_flex_compile(False, backprop=True)
    assert flags() == (False, False)


def test_autotuner_state():
    context.use_autotuner(forward_pass=True, backward_pass=False, thorough_mode_backward=True, steps_forward=3)
    assert context.is_autotuner_enabled_for_forward()
    assert not context.is_autotuner_enabled_for_backward()
    assert not context.is_autotuner_thorough_for_forward()
    assert context.is_autotuner_thorough_for_backward()
    context.use_autotuner(backward_pass=True)
    assert context.is_autotuner_enabled_for_forward()
    assert context.is_autotuner_enabled_for_backward()
    context.disable_autotuner()
    assert not context.is_autotuner_enabled()
    assert not context.is_autotuner_thorough_for_backward()
    context.use_deterministic_algorithms()
    with pytest.raises(RuntimeError, match="autotuner"):
        context.use_autotuner(True, True)
    context.use_autotuner(False, False)
    context.use_deterministic_algorithms(False)
    torch.use_deterministic_algorithms(True)
    context.use_autotuner(True, True)
    assert not context.is_autotuner_enabled()


@pytest.mark.parametrize(
    "call",
    [
        lambda: context.use_fused_na("off"),
        lambda: context.use_fused_na(True, "off"),
        lambda: context.use_kv_parallelism_in_fused_na(None),
        lambda: context.use_deterministic_algorithms(2),
        lambda: context.allow_flex_compile("yes"),
        lambda: context.allow_flex_compile(True, 3),
        lambda: context.allow_flex_compile_backprop(0.0),
        lambda: context.use_autotuner("on"),
        lambda: context.use_autotuner(steps_forward=1.5),
    ],
)
def test_wrong_types(call):
    with pytest.raises(ValueError, match="allowed:"):
        call()
    for _, _, getter, default, _ in SWITCHES:
        assert getter() == default


# --- What the engines are asked --------------------------------------------------------------------------------------


def test_backward_flags():
    assert context.backward_flags() == (False, True, 0)
    with context.use_kv_parallelism_in_fused_na(False), context.set_memory_usage_preference("unrestricted"):
        assert context.backward_flags() == (False, False, 2)
    with context.use_deterministic_algorithms():
        assert context.backward_flags() == (True, False, 0)
        assert context.is_kv_parallelism_in_fused_na_enabled()  # its own switch is untouched
    torch.use_deterministic_algorithms(True)
    assert context.backward_flags() == (True, False, 0)
    assert not context.are_deterministic_algorithms_enabled()
    assert in_thread(context.backward_flags) == (True, False, 0)


def test_compiled_callers_follow_the_switches():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        deterministic, parallel, memory = context.backward_flags()
        fused, flex = context.is_fused_na_enabled(), context.is_flex_compile_backprop_allowed()
        return x + deterministic + 2 * parallel + 4 * memory + 16 * fused + 32 * flex

    def value():
        return int(compiled(torch.zeros(())))

    assert value() == 18
    with context.use_kv_parallelism_in_fused_na(False):
        assert value() == 16
        assert in_thread(value) == 18
        with context.set_memory_usage_preference("unrestricted"):
            assert value() == 24
    context.set_memory_usage_preference("strict")
    assert value() == 22
    context.use_fused_na(False)
    assert value() == 6
    context.allow_flex_compile(True, True)
    assert value() == 38
    torch.use_deterministic_algorithms(True)
    assert value() == 37
    torch.use_deterministic_algorithms(False)
    context.reset()
    assert value() == 18


def test_operators_are_called_with_what_the_switches_say(monkeypatch):
    given = []
    call = _attend.call
    monkeypatch.setattr(_attend, "call", lambda *args: given.append(args[-1]) or call(*args))
    query = torch.randn(1, 9, 1, 8, requires_grad=True)

    def options():
        na1d(query, query, query, kernel_size=3, return_lse=True)[0].sum().backward()  # not the quick way
        return tuple(given.pop()[:4])

    assert options() == ()  # everything has its default
    with context.use_kv_parallelism_in_fused_na(False):
        assert options() == (0, 0, 0, 0)
        assert in_thread(options) == ()
    with context.use_deterministic_algorithms():
        assert options() == (0, 1, 0, 0)
    with context.set_memory_usage_preference("strict"):
        assert options() == (0, 0, 1, 1)
    context.set_memory_usage_preference("unrestricted")
    assert options() == in_thread(options) == (0, 0, 1, 2)
    torch.use_deterministic_algorithms(True)
    assert options() == (0, 1, 0, 2)

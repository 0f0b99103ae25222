"""Wrong input: exit 2 (or 1 where the machine says no), one line that names the argument, and nothing written."""

import pathlib

import numpy as np
import pytest
from program import fail
from safetensors.numpy import save_file

FILES = ["-q", "q.npy", "-k", "k.npy", "-v", "v.npy"]
GOOD = [*FILES, "--kernel-size", "3", "-o", "out.npy"]
SHAPE = ["--layout", "8", "8", "--kernel-size", "3"]


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", random.standard_normal((1, 6, 2, 4)).astype(np.float32))
    np.save(tmp_path / "other.npy", np.zeros((1, 5, 2, 4), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((1, 6, 2, 5), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((1, 6, 2, 4)))
    np.save(tmp_path / "flat.npy", np.zeros((6,), np.float32))
    np.save(tmp_path / "deep.npy", np.zeros((1,) * 7, np.float32))
    np.save(tmp_path / "int.npy", np.zeros((1, 6, 2, 4), np.int64))
    np.save(tmp_path / "big.npy", np.zeros((1, 6, 2, 4), ">f4"))
    np.save(tmp_path / "void.npy", np.zeros((1, 6, 2, 4), "V2"))
    np.save(tmp_path / "record.npy", np.zeros((1,), [("a", "<f4"), ("b", "<f4")]))
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", q=np.zeros(3))
    whole = (tmp_path / "q.npy").read_bytes()
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "short.npy").write_bytes(whole[:-1])
    (tmp_path / "header.npy").write_bytes(whole[:50])
    (tmp_path / "long.npy").write_bytes(whole + b"x")
    (tmp_path / "text.npy").write_text("1 2 3\n")
    save_file({"query": np.zeros((1, 6, 2, 4), np.float32), "steps": np.arange(3)}, tmp_path / "in.safetensors")
    tensors = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(tensors[:-1])
    (tmp_path / "text.safetensors").write_text("this is no such file")
    (tmp_path / "directory").mkdir()
    return tmp_path


def refuse(folder, *arguments, naming, code=2):
    """The program refuses, and every file is as it was."""

    def state():
        return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}

    before = state()
    line = fail(*arguments, naming=naming, code=code, cwd=folder)
    assert state() == before, "nothing is written"
    return line


def replaced(option, value):
    at = GOOD.index(option)
    return ["attend", *GOOD[: at + 1], value, *GOOD[at + 2 :]]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("empty.npy", ".npy"),
        ("short.npy", "191 bytes"),
        ("header.npy", "header"),
        ("long.npy", "193 bytes"),
        ("text.npy", ".npy"),
        ("int.npy", "<i8"),
        ("big.npy", "big-endian"),
        ("void.npy", "--dtype bfloat16"),
        ("record.npy", "fields"),
        ("object.npy", "|O"),
        ("deep.npy", "6 dimensions"),
        ("archive.npz", "safetensors"),
        ("short.safetensors", "outside"),
        ("text.safetensors", "safetensors"),
        ("in.safetensors:steps", "I64"),
        ("in.safetensors:nobody", "'query'"),
        ("directory", "directory"),
    ],
)
def test_files_that_hold_something_else(folder, file, says):
    line = refuse(folder, *replaced("-q", file), naming="--query")
    assert says in line


def test_missing_file(folder):
    line = refuse(folder, *replaced("-k", "nobody.npy"), naming="--key", code=1)
    assert "nobody.npy" in line


@pytest.mark.parametrize(
    ("option", "file", "naming"),
    [
        ("-k", "other.npy", "key"),
        ("-k", "wide.npy", "key"),
        ("-v", "other.npy", "value"),
        ("-v", "double.npy", "value"),
        ("-q", "flat.npy", "query"),
    ],
)
def test_arrays_that_do_not_fit(folder, option, file, naming):
    refuse(folder, *replaced(option, file), naming=naming)


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (["--kernel-size", "0"], "--kernel-size"),
        (["--kernel-size", "-3"], "--kernel-size"),
        (["--kernel-size", "three"], "--kernel-size"),
        (["--kernel-size", "2.5"], "--kernel-size"),
        (["--kernel-size", "99999999999999999999"], "--kernel-size"),
        (["--kernel-size", "3", "3"], "--kernel-size"),
        (["--kernel-size"], "--kernel-size"),
        (["--kernel-size", "3", "--stride", "4"], "--stride"),
        (["--kernel-size", "3", "--stride", "0"], "--stride"),
        (["--kernel-size", "3", "--dilation", "0"], "--dilation"),
        (["--kernel-size", "3", "--causal", "2"], "--causal"),
        (["--kernel-size", "3", "--causal", "top-left"], "--causal"),
        (["--kernel-size", "3", "--causal", "0", "1"], "--causal"),
        (["--kernel-size", "3", "--dense"], "--kernel-size"),
        (["--kernel-size", "3", "--window-left", "2"], "--window-left"),
        (["--kernel-size", "3", "--key-lengths", "2"], "--key-lengths"),
        (["--kernel-size", "3", "--attn-bias", "q.npy"], "--attn-bias"),
        (["--kernel-size", "3", "--additional-keys", "q.npy"], "--additional-values"),
        (["--kernel-size", "3", "--rpb", "q.npy"], "--rpb"),
        (["--kernel-size", "3", "--scale", "nan"], "--scale"),
        (["--kernel-size", "3", "--scale", "inf"], "--scale"),
        (["--kernel-size", "3", "--scale", "x"], "--scale"),
        (["--kernel-size", "3", "--engine", "gpu"], "--engine"),
        (["--kernel-size", "3", "--threads", "-1"], "--threads"),
        (["--kernel-size", "3", "--threads", "1000000000"], "--threads"),
        (["--kernel-size", "3", "--dtype", "float8"], "--dtype"),
        (["--kernel-size", "3", "--names", "a", "b", "c"], "--names"),
        (["--kernel-size", "3", "--input", "in.safetensors"], "--query"),
        (["--kernel-size", "3", "--log-level", "loud"], "--log-level"),
        (["--kernel-size", "3", "--colour"], "--colour"),
        (["--kernel-size", "3", "stray"], "stray"),
        ([], "--kernel-size"),
        (["--dense", "--causal"], "--causal"),
        (["--dense", "--causal", "1"], "--causal"),
        (["--dense", "--stride", "1"], "--stride"),
        (["--dense", "--rpb", "q.npy"], "--rpb"),
        (["--dense", "--window-left", "-2"], "--window-left"),
        (["--dense", "--key-lengths", "7"], "--key-lengths"),
        (["--dense", "--key-lengths", "1", "1"], "--key-lengths"),
        (["--dense", "--cumulative-queries", "0", "6"], "--cumulative-"),
        (["--dense", "--cumulative-queries", "0", "7", "--cumulative-keys", "0", "6"], "--cumulative-queries"),
        (["--dense", "--cumulative-queries", "0", "6", "--cumulative-keys", "0", "4", "2", "6"], "--cumulative-"),
    ],
)
def test_attend_options(folder, options, naming):
    refuse(folder, "attend", *FILES, "-o", "out.npy", *options, naming=naming)


@pytest.mark.parametrize("missing", ["-q", "-k", "-v", "-o"])
def test_missing_operands(folder, missing):
    at = GOOD.index(missing)
    long = {"-q": "--query", "-k": "--key", "-v": "--value", "-o": "--output"}[missing]
    refuse(folder, "attend", *GOOD[:at], *GOOD[at + 2 :], naming=long)


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("directory", 2),
        ("out.txt", 2),
        ("out", 2),
        ("", 2),
        ("directory.npy/", 2),
        ("nowhere/out.npy", 1),
        ("q.npy/out.npy", 1),
        ("out.safetensors:__metadata__", 2),
    ],
)
def test_outputs_that_cannot_be(folder, place, code):
    refuse(folder, *replaced("-o", place), naming="--output", code=code)
    refuse(folder, "attend", *GOOD, "--lse", place, naming="--lse", code=code)


def test_output_that_is_a_directory_of_that_name(folder):
    (folder / "out.npy").mkdir()
    refuse(folder, "attend", *GOOD, naming="--output")


def test_outputs_in_the_same_place(folder):
    refuse(folder, "attend", *GOOD, "--lse", "./out.npy", naming="--lse")


def test_a_device_is_not_replaced(folder):
    (folder / "null.npy").symlink_to("/dev/null")
    refuse(folder, *replaced("-o", "null.npy"), naming="--output")
    assert pathlib.Path("/dev/null").is_char_device()


def test_bad_names_in_safetensors_input(folder):
    arguments = ["attend", "-i", "in.safetensors", "--dense", "-o", "out.npy"]
    assert "'key'" in refuse(folder, *arguments, naming="--input")
    refuse(folder, *arguments, "--names", "a", "b", naming="--names")
    refuse(folder, "attend", "-i", "q.npy", "--dense", "-o", "out.npy", naming="--input")


@pytest.mark.parametrize("command", ["plan", "profile"])
@pytest.mark.parametrize(
    ("options", "naming"),
    [
        ([], "--layout"),
        (["--layout", "-8", "--kernel-size", "3"], "--layout"),
        (["--layout", "8", "8", "8", "8", "--kernel-size", "3"], "--layout"),
        (["--layout", "8"], "--kernel-size"),
        ([*SHAPE, "--heads", "0"], "--heads"),
        ([*SHAPE, "--heads", "4", "--heads-kv", "3"], "--heads-kv"),
        ([*SHAPE, "--head-dim", "0"], "--head-dim"),
        ([*SHAPE, "--head-dim-v", "-1"], "--head-dim-v"),
        ([*SHAPE, "--batch", "-1"], "--batch"),
        ([*SHAPE, "--additional-tokens", "-1"], "--additional-tokens"),
        ([*SHAPE, "--dtype", "int8"], "--dtype"),
        ([*SHAPE, "--keys", "9"], "--keys"),
        ([*SHAPE, "--attn-bias"], "--attn-bias"),
        ([*SHAPE, "--scale", "nan"], "--scale"),
        ([*SHAPE, "--engine", "sm70"], "--engine"),
        (["--layout", "8", "8", "--dense"], "--layout"),
        (["--layout", "8", "--dense", "--keys", "-1"], "--keys"),
        (["--layout", "8", "--dense", "--rpb"], "--rpb"),
    ],
)
def test_shapes(tmp_path, command, options, naming):
    refuse(tmp_path, command, *options, naming=naming)


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--repeats", "many"], "--repeats"),
        (["--warmup", "-1"], "--warmup"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--peak-gflops", "0"], "--peak-gflops"),
    ],
)
def test_profile_options(tmp_path, options, naming):
    refuse(tmp_path, "profile", *SHAPE, *options, naming=naming)


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        ([], "attend, compile, denoise, plan, profile or info"),
        (["attned"], "attned"),
        (["--nothing"], "--nothing"),
        (["info", "extra"], "extra"),
        (["--log-level", "debug"], "command"),
    ],
)
def test_commands(tmp_path, arguments, naming):
    refuse(tmp_path, *arguments, naming=naming)

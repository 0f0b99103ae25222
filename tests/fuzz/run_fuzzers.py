"""Writes the seed corpora and runs every fuzzer for a while.

    run_fuzzers.py BUILD/tests/fuzz --seconds 60

Exits with 1 when a fuzzer found something; the input is then in BUILD/tests/fuzz/<name>.crash-*.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def npy(descr: str, shape: tuple, data: bytes, fortran: bool = False, major: int = 1) -> bytes:
    text = str({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes([major, 0]) + struct.pack("<H" if major == 1 else "<I", len(text)) + text + data


def safetensors(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def npy_seeds() -> list:
    return [
        npy("<f4", (2, 3), bytes(24)),
        npy("<f4", (2, 3, 2), bytes(48), fortran=True),
        npy("<f8", (), bytes(8), major=2),
        npy("<f2", (0, 5), b"", major=3),
        npy("<V2", (4,), bytes(8)),
        npy(">f4", (1,), bytes(4)),
        npy("<i8", (1,), bytes(8)),
        npy("<f4", (2**62, 4), b""),
    ]


def safetensors_seeds() -> list:
    return [
        safetensors({}, b""),
        safetensors({"a": tensor("F32", [2], 0, 8)}, bytes(8)),
        safetensors({"__metadata__": {"k": "v"}, "b": tensor("BF16", [1, 2], 0, 4)}, bytes(4)),
        safetensors({"b": tensor("BF16", [1, 2], 8, 12), "a": tensor("F64", [], 0, 8)}, bytes(12)),
        safetensors({"a": tensor("F16", [0, 3], 0, 0), "b": tensor("I64", [1], 0, 8)}, bytes(8)),
        safetensors({"a": tensor("F32", [2**62, 2**62], 0, 4)}, bytes(4)),
    ]


def problems_seeds() -> list:
    windows = {"kind": "neighborhood", "kernel_size": [3, 2], "stride": 1, "dilation": [1, 2], "is_causal": [0, 1]}
    dense = {"kind": "dense", "keys": 4, "causal": "top-left", "window_left": 2, "key_lengths": [4, 3]}
    a = {"dtype": "float16", "layout": [5, 6], "heads": 4, "heads_kv": 2, "head_dim": 8, "rpb": True, "mask": windows}
    b = {"batch": 2, "layout": [4], "head_dim": 8, "scale": 0.5, "additional_tokens": 3, "mask": dense}
    lines = [a, b, [a, {"engine": "cpu", "problem": b}]]
    return [json.dumps(a).encode(), json.dumps(b, indent=1).encode(), "\n".join(map(json.dumps, lines)).encode()]


def args_seeds() -> list:
    lines = [
        "--help",
        "info --json",
        "attend --help",
        "attend -q a.npy -k a.npy -v a.npy --kernel-size 3 --stride 2 --causal -o o.npy --lse l.npy",
        "attend -q a.npy -k a.npy -v a.npy --kernel-size 3 --rpb r.npy -o o.npy --engine reference",
        "attend -q b.npy -k b.npy -v b.npy --kernel-size 3 2 --dilation 1 2 --causal 0 1 -o o.safetensors --scale 0",
        "attend -q c.npy -k c.npy -v c.npy --kernel-size 2 2 1 -o o.npy",
        "attend -q a.npy -k a.npy -v a.npy --additional-keys t.npy --additional-values t.npy --kernel-size 3 -o o.npy",
        "attend -q a.npy -k t.npy -v t.npy --dense --causal bottom-right --window-left 2 --window-right -1 -o o.npy",
        "attend -q a.npy -k a.npy -v a.npy --dense --attn-bias m.npy --key-lengths 3 -o o.npy",
        "attend -q a.npy -k a.npy -v a.npy --dense --cumulative-queries 0,2,5 --cumulative-keys 0,1,5 -o o.npy",
        "attend -i s.safetensors --dense --causal top-left -o o.safetensors --lse o.safetensors",
        "attend -i s.safetensors --names key query value --dense -o o.safetensors:x",
        "plan --layout 5 6 --heads 4 --heads-kv 2 --head-dim 8 --head-dim-v 3 --kernel-size 3 --json",
        "plan --layout 16 --keys 9 --batch 2 --dense --causal bottom-right --dtype bfloat16 --attn-bias",
        "plan --layout 4 5 6 --kernel-size 2 3 4 --rpb --additional-tokens 3 --engine reference",
        "profile --layout 8 --kernel-size 3 --repeats 1 --seconds 0.01 --no-backward --peak-gflops 10",
    ]
    return [line.replace(" ", "\n").encode() for line in lines]


def run(binary: pathlib.Path, corpus: pathlib.Path, seeds: list, seconds: int, extra: list) -> bool:
    corpus.mkdir(exist_ok=True)
    for index, seed in enumerate(seeds):
        (corpus / f"seed-{index}").write_bytes(seed)
    command = [str(binary), str(corpus), f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048"]
    command += [f"-artifact_prefix={binary}.", "-print_final_stats=1", *extra]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    stats = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line or "Done" in line]
    print(f"{binary.name}: exit {done.returncode}; " + "; ".join(stats), flush=True)
    if done.returncode != 0:
        print(done.stderr[-6000:], flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path, help="folder that holds the fuzzers")
    parser.add_argument("--seconds", type=int, default=60, help="for each fuzzer")
    arguments = parser.parse_args()
    build = arguments.build.resolve()
    fuzzers = {
        "fuzz_npy": (npy_seeds(), ["-max_len=4096"]),
        "fuzz_safetensors": (safetensors_seeds(), ["-max_len=4096"]),
        "fuzz_problems": (problems_seeds(), ["-max_len=2048"]),
        "fuzz_args": (args_seeds(), ["-max_len=512", f"-dict={HERE / 'args.dict'}"]),
    }
    good = [
        run(build / name, build / f"{name}.corpus", seeds, arguments.seconds, extra)
        for name, (seeds, extra) in fuzzers.items()
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

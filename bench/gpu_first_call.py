"""Times first calls in this process: `gpu_first_call.py PROBLEMS_FILE NAME...`. Prints JSON: seconds by problem.

A tiny call of another problem comes first, for what happens once in a process (opening libraries, the CUDA context).
"""

import functools
import json
import sys
import time
from pathlib import Path

import gpu_calls
import torch


def seconds(call) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    problems = {p["name"]: p for p in json.loads(Path(sys.argv[1]).read_text())["problems"]}
    other = {"mask": "dense", "layout": [40], "batch": 1, "heads": 1, "head_dim": 8}
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in gpu_calls.shapes_of(other)]
    found = {"process": {"forward": seconds(lambda: gpu_calls.forward(other, *tensors[:3]))}}
    for name in sys.argv[2:]:
        # Fewer batch entries and heads: compiling is what takes the time, not the computation.
        problem = problems[name] | {"batch": 1}
        given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in gpu_calls.shapes_of(problem)]
        forward = functools.partial(gpu_calls.forward, problem, *given[:3])
        found[name] = {"forward": seconds(forward), "warm_forward": seconds(forward)}
        found[name]["backward"] = seconds(gpu_calls.backward_call(problem, given, "backward"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

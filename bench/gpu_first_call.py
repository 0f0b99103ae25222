"""Times first calls in this process: `gpu_first_call.py [--training] PROBLEMS_FILE NAME...`.

Prints JSON: seconds by problem.
A tiny call of another problem comes first, for what happens once in a process (opening libraries, the CUDA context).
With --training the calls are those of a training step: the kernels of gradients are compiled while the forward pass is.
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


def training_step(problem: gpu_calls.Problem, given: list[torch.Tensor]) -> dict[str, float]:
    calls = []
    forward = seconds(lambda: calls.append(gpu_calls.backward_call(problem, given, "backward")))
    return {"forward": forward, "backward": seconds(calls[0])}


def main() -> None:
    training = sys.argv[1] == "--training"
    file, *names = sys.argv[2 if training else 1 :]
    problems = {p["name"]: p for p in json.loads(Path(file).read_text())["problems"]}
    other = {"mask": "dense", "layout": [40], "batch": 1, "heads": 1, "head_dim": 8}
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in gpu_calls.shapes_of(other)]
    found = {"process": {"forward": seconds(lambda: gpu_calls.forward(other, *tensors[:3]))}}
    for name in names:
        # Fewer batch entries and heads: compiling is what takes the time, not the computation.
        problem = problems[name] | {"batch": 1}
        given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in gpu_calls.shapes_of(problem)]
        if training:
            found[name] = training_step(problem, given)
            continue
        forward = functools.partial(gpu_calls.forward, problem, *given[:3])
        found[name] = {"forward": seconds(forward), "warm_forward": seconds(forward)}
        found[name]["backward"] = seconds(gpu_calls.backward_call(problem, given, "backward"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Engine sm80 on a GPU against the oracle: every nasty problem in its list, and random ones (--gpu-cases of them)."""

import pytest
import torch
from gpu_check import check
from gpu_problems import fixed, random_case, variations
from gpu_support import PRESENT, needs_gpu

pytestmark = needs_gpu
# Of each random problem; all but the first need no compilation.
VARIATIONS = 4


@pytest.mark.parametrize("case", fixed() if PRESENT else fixed()[:1], ids=str)
def test_nasty_problem(case):
    print(f"{check(case):.2f} of the error allowed")


@pytest.mark.random_cases
def test_random_problem(seed):
    case = random_case(seed)
    for variation in variations(case, VARIATIONS):
        print(f"{variation.name}: {check(variation, ways=(seed % 2 == 0,)):.2f} of the error allowed")
    torch.cuda.empty_cache()  # many of these run at the same time

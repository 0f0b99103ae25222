"""The emulation itself: what of PTX it translates, and that it says what is wrong with a kernel."""

import emulated_text
import pytest
from translate import Untranslatable, entry, translated

SHARED = "extern __shared__ unsigned char memory[]; const unsigned at = __cvta_generic_to_shared(memory);"
BARRIER = 'asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(1) : "memory");'
WAIT = """unsigned done; asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\\n"
       "selp.u32 %0, 1, 0, p;\\n}" : "=r"(done) : "r"(at), "r"(0) : "memory");"""


def test_an_instruction_is_a_call_with_operands_in_the_order_of_its_text():
    text = 'asm volatile("a.b::c.m8 {%0, %1}, [%3, {%2}], 7; // remark" : "=r"(x[0]), "+f"(f(1)) : "r"(u), "l"(&p));'
    assert translated(text) == "{ ptx::a_b_c_m8(ptx::list((x[0]), (f(1))), (&p), ptx::list((u)), 7); }"
    assert translated('asm volatile("" : "+f"(d)::"memory")') == "{  }"
    wgmma = translated(
        'asm("{\\n.reg .pred p;\\nsetp.ne.b32 p, %1, 0;\\nw.m64n80k16.f32 {%0}, p;\\n}" : "=f"(d) : "r"(n));'
    )
    assert wgmma == "{ bool p = false; ptx::setp_ne_b32(p, (n), 0); ptx::w_m64k16_f32<80>(ptx::list((d)), p); }"


def test_a_kernel_has_one_argument_of_a_type_with_a_name():
    with pytest.raises(Untranslatable, match="0 kernels"):
        entry("void f();")
    with pytest.raises(Untranslatable, match="f has the parameters int x"):
        entry('extern "C" __global__ void __launch_bounds__(32, 1) f(int x) {}')


def test_an_unknown_instruction_is_named(elsewhere):
    image, log = elsewhere(emulated_text.compiled, 'int y; asm("brev.b32 %0, %1;" : "=r"(y) : "r"(1));')
    assert not image and "brev_b32" in log


def test_threads_meet(elsewhere):
    body = "__shared__ int sum[2]; sum[0] = 0; __syncthreads(); atomicAdd(&sum[0], 1); __syncthreads();"
    body += "args.out[threadIdx.x] = sum[0] + __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);"
    assert elsewhere(emulated_text.launched, body) == ([64 + (i ^ 1) for i in range(64)], "")


FAULTS = {
    "all threads wait": 'if (threadIdx.x < 32) asm volatile("bar.sync %0, %1;" ::"r"(1), "r"(64) : "memory");',
    "shared memory was written beyond its 1024 bytes": f"{SHARED} memory[1024] = 1;",
    "which is not aligned": f"""{SHARED} asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        ::"r"(at), "l"(reinterpret_cast<char*>(args.out) + 4), "r"(16) : "memory");""",
    "there is no barrier at 0": f"{SHARED} {WAIT}",
    "more arrivals than it was made for": f"""{SHARED} {BARRIER}
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(8) : "memory");
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");""",
    "lanes of a warp came to different instructions": "if (threadIdx.x % 2) __syncwarp(); else __all_sync(~0u, 1);",
    "which is not in the mask": "if (threadIdx.x % 2) __shfl_xor_sync(0xaaaaaaaa, 1, 1);",
}


@pytest.mark.parametrize("text", FAULTS)
def test_what_is_wrong_with_a_kernel_is_an_error_of_its_launch(elsewhere, text):
    _, error = elsewhere(emulated_text.launched, FAULTS[text])
    assert text in error and error.startswith("block 0 0")
    assert elsewhere(emulated_text.launched, "args.out[threadIdx.x] = 1;") == ([1] * 64, "")


def test_a_copy_is_there_when_it_was_waited_for(elsewhere):
    body = f"""{SHARED} args.out[threadIdx.x] = 5; __syncthreads(); if (threadIdx.x > 0) return;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(args.out), "r"(16) : "memory");
      asm volatile("cp.async.commit_group;" ::: "memory");
      args.out[8] = *reinterpret_cast<int*>(memory);
      asm volatile("cp.async.wait_group %0;" ::"n"(0) : "memory");
      args.out[9] = *reinterpret_cast<int*>(memory);"""
    out, error = elsewhere(emulated_text.launched, body)
    assert (out[7:10], error) == ([5, 0x4B4B4B4B, 5], "")

"""What the emulator demands of single instructions, as the device does (csrc/emulator/README.md): each kernel of
tests/fixtures/emulator/strict.cu runs, and with its planted error is refused, with the kernel's line."""

import math
import re
import subprocess

import pytest
import torch
from emulated import call, library, marked

from finetune.kernels import cuda_toolkit
from finetune.ops._check import unchanged

# Where the memory of the call's tensors lies is malloc's choice.
OUTSIDE = r"reads 128 bytes .*(past the end|before|over the end|outside of every tensor|uninitialized)"
WGMMA, BOX = {"block": 128, "shared": 16384}, {"shared": 4096}
# kernel: what its message must say; the arguments of the call; the mark of the line, where it is not the kernel's name
STRICT = {
    "shared_to_store": (r"a shared address given to a global store", {}),
    "variable_to_store": (r"a thread's own address given to a global store", {}),
    "global_to_store_shared": (r"a global address given to a shared store", {}),
    "misaligned_store": (r"misaligned: a global store at an address that is 4 past a multiple of 16", {}),
    "shared_to_ldg": (r"a shared address given to __ldg", {}),
    "variable_to_atomic": (r"a thread's own address given to an atomic", {}),
    "misaligned_atomic": (r"misaligned: an atomic at an address that is 2 past a multiple of 4", {}),
    "copy_to_global": (r"a global address given to cp.async's destination", {}),
    "copy_from_shared": (r"a shared address given to cp.async's source", {}),
    "copy_of_nothing": (r"misaligned: cp.async's source at an address that is 4 past a multiple of 16", {}),
    "ldmatrix_of_global": (r"a global address given to ldmatrix", {}),
    "ldmatrix_misaligned": (r"misaligned: ldmatrix at an address that is 8 past a multiple of 16", {}),
    "static_shared_memory": (r"more than 48 KiB of static shared memory", {}),
    "all_shared_memory": (r"more than 227 KiB of shared memory", {"shared": 226 * 1024}),
    "ldmatrix_diverges": (r"lanes of one warp meet in different collectives, here and at strict.cu", {}),
    "width_of_a_shuffle": (r"a shuffle whose width is no power of two", {}),
    "different_masks": (r"deadlock: 64 threads wait at a warp collective", {}),
    "half_a_warp_at_a_barrier": (r"a warp collective whose mask names a lane that has exited", {}),
    "barrier_of_two_sizes": (r"threads of one named barrier expect different numbers", {"block": 96}),
    "mbarrier_in_global": (r"a global address given to an mbarrier", {}),
    "mbarrier_misaligned": (r"misaligned: an mbarrier at an address that is 4 past a multiple of 8", {}),
    "mbarrier_of_none": (r"an mbarrier of no arrivals", {}),
    "mbarrier_twice": (r"an mbarrier is initialized again while it lives", {}),
    "mbarrier_without_init": (r"an mbarrier that nobody has initialized", {}),
    "mbarrier_of_a_megabyte": (r"an mbarrier expects more than 2\^20 - 1 bytes", {}),
    "bulk_source": (r"misaligned: a bulk copy's source at an address that is 8 past", {}, "bulk_copy"),
    "bulk_size": (r"a bulk copy of no multiple of 16 bytes", {}, "bulk_copy"),
    "bulk_destination": (r"a global address given to a copy's destination", {}, "bulk_copy"),
    "map_in_a_variable": (r"a tensor map that is no argument of the kernel", BOX, "tensor_copy"),
    "box_misaligned": (r"misaligned: a copy's destination at an address that is 512 past", BOX, "tensor_copy"),
    "matrix_of_global": (r"a global address given to a matrix descriptor", WGMMA),
    "matrix_misaligned": (r"misaligned: a matrix descriptor at an address that is 8 past", WGMMA),
    "matrix_of_the_second_row": (r"a row that is not the first of the swizzle's eight", WGMMA),
    "accumulators_after_the_fence": (r"a register of a wgmma is written after the wgmma.fence", WGMMA),
    "operands_after_the_fence": (r"a register of a wgmma is written after the wgmma.fence", WGMMA),
    "operands_before_the_wait": (r"a register of a wgmma was written before this wgmma.wait_group", WGMMA),
    "products_of_two_kinds": (r"threads of one warpgroup describe different matrices", WGMMA),
    "too_many_registers": (r"deadlock: 128 threads wait at setmaxnreg", {"block": 256}),
    "fewer_by_inc": (r"setmaxnreg takes registers with .dec", {"block": 256}),
    "odd_registers": (r"setmaxnreg of no multiple of 8", {"block": 256}),
}
CHECKED = {  # what only the checked build sees
    "ldg_of_written": (r"reads, by an instruction for constant memory, what this kernel has written", {}),
    "mbarrier_seen_too_soon": (r"race: updates atomically byte 0 of shared array 'bar'", {"block": 64}),
    "mbarrier_read": (r"reads 8 bytes at byte 0 of shared array 'bar' .* which hold an mbarrier", {}),
    "mbarrier_not_waited_for": (r"race: reads byte|nobody has written yet", {}),
    "mbarrier_arrived_at_too_soon": (r"race: (reads|writes) byte \d+ of shared array 's'", {}),
    "arrivals_of_the_next_phase": (r"race: (reads|writes) byte \d+ of shared array 's'", {}),
    "bulk_over_what_threads_wrote": (r"writes byte .* asynchronously, .* no fence.proxy.async", {}, "bulk_copy"),
    "fence_after_the_barrier": (r"asynchronously, .* with no fence.proxy.async in between", {}, "bulk_copy"),
    "box_outside_of_memory": (OUTSIDE, BOX, "tensor_copy"),
    "tiles_not_fenced": (r"reads byte \d+ of dynamic .* asynchronously, .* with no fence.proxy.async", WGMMA),
    "accumulators_before_the_wait": (r"reads a register of a wgmma under way", WGMMA),
    "tiles_before_the_wait": (r"race: writes byte .* which an asynchronous copy or wgmma .* read at", WGMMA),
}


def run(kernel, options, bug, build):
    x, y, count = torch.arange(64.0), torch.empty(64), torch.zeros(1, dtype=torch.int32)
    call(kernel, ("in", x), ("out", y), ("inout", count), bug=bug, build=build, **options)


def refused(kernel, build, words, options, mark=""):
    run(kernel, options, "", build)
    with pytest.raises(RuntimeError, match=words) as error:
        run(kernel, options, "planted", build)
    assert int(re.search(r"strict.cu:(\d+)", str(error.value))[1]) in marked(mark or kernel), error.value


@pytest.mark.parametrize("build", ["emulated", "checked"])
@pytest.mark.parametrize("kernel", STRICT)
def test_the_device_would_refuse_it(kernel, build):
    refused(kernel, build, *STRICT[kernel])


@pytest.mark.parametrize("order", [0, 1, 5], ids=("as numbered", "reversed", "shuffled"))
@pytest.mark.parametrize("kernel", CHECKED)
def test_the_device_would_go_wrong(kernel, order):
    library("checked").set_order(order)
    try:
        refused(kernel, "checked", *CHECKED[kernel])
    finally:
        library("checked").set_order(0)


# --- numbers: CUDA Math API ("Intrinsics"), PTX ISA (ex2, cvt)


def test_intrinsics():
    nan, inf, tiny, huge = math.nan, math.inf, 1e-40, 2.0**127
    pairs = [(nan, 1.0), (1.0, nan), (nan, nan), (2.0, -3.0), (1.0, huge), (-1.0, huge), (inf, huge), (1.0, inf)]
    pairs += [(3.0, 2.0**126), (2.5, 1.0), (3.5, 1.0), (-2.5, 1.0), (3e9, 1.0), (-3e9, 1.0), (inf, 1.0), (tiny, 2.0)]
    pairs += [(-126.5, 1.0), (-126.0, 1.0), (-60.7, 3.0), (60.7, 7.0)]
    x, y = (torch.tensor(column + (1.0,) * (64 - len(pairs))) for column in zip(*pairs, strict=True))
    out = torch.empty(7, 64)
    call("intrinsics", ("in", x), ("in", y), ("out", out), build="emulated")
    assert unchanged(out[0], torch.fmax(x, y))
    assert unchanged(out[1], torch.fmin(x, y))
    quotient = torch.where((y > 2.0**126) & y.isfinite(), torch.where(x.isinf(), nan, torch.zeros(64)), x / y)
    assert unchanged(out[2].abs(), quotient.abs())
    assert unchanged(out[3], torch.exp2(x * 1.44269504))
    assert unchanged(out[4], torch.log2(x) * 0.693147181)
    exact = torch.exp2(x.double()).float()
    assert unchanged(out[5][:15], torch.where(exact < 2.0**-126, 0.0, exact)[:15])
    assert out[5][15] == 1
    assert out[5][16:18].tolist() == [0.0, 2.0**-126]
    rounded = [0, 1, 0, 2, 1, -1, 2**31 - 1, 1, 3, 2, 4, -2, 2**31 - 1, -(2**31), 2**31 - 1, 0, -126, -126, -61, 61]
    assert out[6].view(torch.int32)[: len(rounded)].tolist() == rounded


# --- conversions, to the bit those of CUDA's own headers (which g++ compiles too)

HEADERS = next(
    (path for folder in cuda_toolkit.folders() for path in [folder.parent / "include"] if path.is_dir()), None
)
PROGRAM = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdio>
template <class T>
void write(T t) { fwrite(&t, sizeof t, 1, stdout); }
int main(int, char** words) {
  const int kind = words[1][0] - '0';
  for (float x; fread(&x, 4, 1, stdin) == 1;) {
    if (kind == 0) write(__float2bfloat16(x));
    if (kind == 1) write(__float2half(x));
    if (kind > 1) {
      write(__nv_cvt_float_to_fp8(x, kind > 3 ? __NV_SATFINITE : __NV_NOSAT, kind % 2 ? __NV_E5M2 : __NV_E4M3));
    }
  }
}
"""


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The program that writes each number of its input in the type whose number it is given."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "narrow.cpp").write_text(PROGRAM)
    command = ["g++", "-O1", "-std=c++20", "-isystem", HEADERS, folder / "narrow.cpp", "-o", folder / "narrow"]
    subprocess.run(command, check=True)
    return folder / "narrow"


@pytest.mark.skipif(not HEADERS, reason="no CUDA headers: pip install -e '.[test]'")
@pytest.mark.parametrize("kind", range(6), ids=("bf16", "f16", "e4m3", "e5m2", "e4m3 saturated", "e5m2 saturated"))
def test_conversions_are_those_of_cudas_headers(narrow, kind):
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(
        torch.int32
    )  # of fp32: NaNs of every kind too
    near = torch.randn(100_000, generator=g) * torch.tensor([1e-6, 0.01, 1.0, 300.0, 4e4]).repeat(20_000)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = (halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001])).to(torch.int32)
    x = torch.cat([patterns.view(torch.float32), near, ties.flatten().view(torch.float32)]).contiguous()
    dtype = torch.int16 if kind < 2 else torch.uint8
    out = subprocess.run([narrow, str(kind)], input=x.numpy().tobytes(), capture_output=True, check=True).stdout
    got = torch.empty(x.numel(), dtype=dtype)
    call("to_narrow", ("in", x), ("out", got), ("in", torch.tensor([x.numel()])), number=kind, build="emulated")
    assert torch.equal(got, torch.frombuffer(bytearray(out), dtype=dtype))

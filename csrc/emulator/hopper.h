// What sm_90 adds, for the emulator: mbarriers, bulk copies by the Tensor Memory Accelerator (TMA), and wgmma, the
// asynchronous product by a warpgroup of four warps. csrc/cuda/device/ptx_hopper.cuh is their face to the kernels.
//
// All three are asynchronous, and a kernel that does not wait gets away with it on some runs of a GPU and not on
// others. Here it never does: copies land and products are made as late as can be (when no thread can go on without
// them), or, with `eager`, at once; a product's accumulators hold NaN until it was waited for; shared memory that a
// copy writes or a product reads may not be given to another copy or product meanwhile; a product's registers are those
// that its fence saw, unchanged until the wait. README.md lists what is asked of each instruction.
#pragma once

#include <initializer_list>

#include "emulator.h"

namespace emulator {

// A tensor of up to 4 dimensions of 2-byte elements, the first adjacent, and the box of it that one copy moves: rows of
// 64 elements (128 bytes), swizzled.
struct alignas(64) TensorMap {
  const char* data;
  int64_t size[4], stride[4];  // elements, bytes
  int box[4];
};

// A matrix descriptor's address (as the hardware's hold it: bytes into the window of shared memory).
unsigned matrix_address(const void* p, unsigned stride, unsigned leading, Site site);

void mbarrier_init(uint64_t* bar, unsigned count, Site site);
void mbarrier_init_fence();  // makes the running thread's inits visible to copies
void mbarrier_arrive(uint64_t* bar, unsigned expected_bytes, Site site);
void mbarrier_wait(uint64_t* bar, unsigned parity, Site site);
void async_proxy_fence(Site site);

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* bar, Site site);
void tensor_copy(void* shared, const TensorMap& map, const int (&at)[4], uint64_t* bar, Site site);

// d (64, n) += a (64, 16) · b (16, n). A thread's accumulators are d[4 j + i] as in ptx_hopper.cuh. a: four registers,
// or null where `a_matrix` describes it. accumulate false: d's old values do not count.
struct Product {
  float* d;
  int n;
  const unsigned* a;
  uint64_t a_matrix, b_matrix;
  bool b_transposed, accumulate;
  float (*widen)(uint16_t);
};
struct Registers {
  const void* data;
  size_t bytes;
};
void wgmma_fence(std::initializer_list<Registers> registers, Site site);
void wgmma(const Product& product, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int groups_left, Site site);

// setmaxnreg: the number of registers a thread of this warpgroup has from now on, more or fewer than it has.
void set_registers(int count, bool more, Site site);

// For the scheduler: a block begins; all its threads have passed a barrier; no thread can go on, so what is under way
// continues by a step (false: nothing is); what is unfinished at the end, or "".
void begin_asynchronous();
void join_asynchronous();
bool land_one();
const char* unfinished();

}  // namespace emulator

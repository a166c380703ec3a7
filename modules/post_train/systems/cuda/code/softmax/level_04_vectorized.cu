// Each lane reads and writes four elements at once: a quarter of the memory instructions.
//
// A request of a warp is 512 bytes in a row. The sectors are the same as before; what falls is the number of requests,
// and with it the instructions that a scheduler has to issue. Rows that do not begin on 16 bytes are read one by one.
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace finetune {
namespace {

constexpr int kWarps = 4, kWide = 4;

// Calls f.operator()<N>(i) for the elements [0, columns) that are this lane's, N at a time.
template <class F>
__device__ __forceinline__ void for_each_of_lane(int64_t columns, bool aligned, int lane, F&& f) {
  const int64_t groups = aligned ? columns / kWide : 0;
  for (int64_t i = lane; i < groups; i += 32) f.template operator()<kWide>(i * kWide);
  for (int64_t i = groups * kWide + lane; i < columns; i += 32) f.template operator()<1>(i);
}

__global__ void __launch_bounds__(kWarps * 32) softmax(const float* x, float* y, int64_t rows, int64_t columns) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  x += row * columns;
  y += row * columns;
  const bool aligned = are_aligned(x, y);
  float row_max = -INFINITY, row_sum = 0.0f;
  for_each_of_lane(columns, aligned, lane, [&]<int N>(int64_t i) {
    const auto v = load<float, N>(x + i);
    float new_max = row_max;
#pragma unroll
    for (int j = 0; j < N; ++j) new_max = fmaxf(new_max, v.at[j]);
    row_sum *= __expf(row_max - new_max);
#pragma unroll
    for (int j = 0; j < N; ++j) row_sum += __expf(v.at[j] - new_max);
    row_max = new_max;
  });
  const float all = warp_max(row_max);
  row_sum = warp_sum(row_max == -INFINITY ? 0.0f : row_sum * __expf(row_max - all));
  for_each_of_lane(columns, aligned, lane, [&]<int N>(int64_t i) {
    const auto v = load<float, N>(x + i);
    Vector<float, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = __expf(v.at[j] - all) / row_sum;
    store(y + i, out);
  });
}

}  // namespace
}  // namespace finetune

extern "C" int launch_level(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  using namespace finetune;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kWarps)));
  return static_cast<int>(launch(softmax, grid, dim3(kWarps * 32), 0, stream, x, y, rows, columns));
}

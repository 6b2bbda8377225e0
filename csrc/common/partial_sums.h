// The second stage of a gradient that is summed over all rows: partial sums, one line per block, are added in
// one fixed order, so that the same inputs give the same bits.
#pragma once
#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

// first[c] or second[c - split] = sum over p of partials[p, c], p < count, c < columns. A block has 32 columns
// and 32 lines at a time: a warp reads 128 bytes of a line, and 1024 threads keep as many loads in flight.
template <int LINES>
__global__ void __launch_bounds__(WARP* LINES)
    sum_partials_kernel(const float* partials, int count, i64 columns, float* first, float* second, i64 split) {
  struct Shared {
    float sums[LINES][WARP];
  };
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % WARP, line = threadIdx.x / WARP;
  const i64 column = i64(blockIdx.x) * WARP + lane;
  float total = 0;
  if (column < columns) {
#pragma unroll 4
    for (int p = line; p < count; p += LINES) total += partials[p * columns + column];
  }
  shared.sums[line][lane] = total;
  __syncthreads();
  if (line != 0 || column >= columns) return;
  total = 0;
#pragma unroll
  for (int i = 0; i < LINES; ++i) total += shared.sums[i][lane];
  if (column < split)
    first[column] = total;
  else
    second[column - split] = total;
}

inline void sum_partials(const char* op, const float* partials, i64 count, i64 columns, float* first,
                         float* second, i64 split, uintptr_t stream) {
  constexpr int LINES = 32;
  launch(op, sum_partials_kernel<LINES>, dim3(unsigned(ceil_div(columns, WARP))), WARP * LINES,
         sizeof(float) * LINES * WARP, stream, partials, int(count), columns, first, second, split);
}

}  // namespace cuda
}  // namespace gpt2fast

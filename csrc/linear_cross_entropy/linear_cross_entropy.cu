// Scales the gradients of linear + cross-entropy by a number that only the GPU knows.
//
//   v *= factor / count, or 0 where no row counts
//   moves     v once in and once out; nothing where the number is 1, as it is in most training steps: the
//             host need not wait for it to find out.
//   work      a thread has 4 pieces of 16 bytes.
#include "linear_cross_entropy/linear_cross_entropy_cuda.h"

#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

constexpr int SCALE_THREADS = 256, SCALE_PIECES = 4;

template <int V>
__global__ void __launch_bounds__(SCALE_THREADS)
    scale_kernel(float* values, const float* factor, const float* count, i64 size) {
  float by = factor ? *factor : 1.0f;
  if (count) by = *count > 0 ? by / *count : 0.0f;
  if (by == 1) return;
  const i64 begin = (i64(blockIdx.x) * SCALE_PIECES * SCALE_THREADS + threadIdx.x) * V;
#pragma unroll
  for (int i = 0; i < SCALE_PIECES; ++i) {
    const i64 place = begin + i64(i) * SCALE_THREADS * V;
    if (place >= size) return;
    if (place + V <= size) {
      auto x = load_vector<false, Vector<float, V>>(values + place);
#pragma unroll
      for (int j = 0; j < V; ++j) x.at[j] *= by;
      store_vector(values + place, x);
    } else {
      for (i64 j = place; j < size; ++j) values[j] *= by;
    }
  }
}

void scale(uintptr_t values, uintptr_t factor, uintptr_t count, i64 size, uintptr_t stream) {
  const auto run = [&](auto kernel, int width) {
    launch("scale", kernel, dim3(unsigned(ceil_div(size, i64(width) * SCALE_PIECES * SCALE_THREADS))), SCALE_THREADS,
           0, stream, (float*)values, (const float*)factor, (const float*)count, size);
  };
  if (values % 16 == 0)
    run(scale_kernel<4>, 4);
  else
    run(scale_kernel<1>, 1);
}

}  // namespace cuda
}  // namespace gpt2fast

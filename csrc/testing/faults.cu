// A kernel with faults that the emulator must find: it proves the emulator. Most faults give right numbers
// where threads run one after another.
#include "testing/faults.h"

#include <cstring>

#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

enum Fault {
  NONE, NO_BARRIER, BEYOND_TENSOR, BEYOND_SHARED, UNWRITTEN, MISALIGNED, DIVERGENT, EARLY_EXIT, WARP_ORDER,
  OTHER_BLOCK, HALF_SHUFFLE, SHUFFLE_IS_NO_BARRIER, OVERWRITTEN, TOO_LARGE
};

__global__ void fault_kernel(const float* x, float* y, i64 count, int fault) {
  float* shared = &shared_memory<float>();
  const int t = threadIdx.x;
  const i64 begin = i64(blockIdx.x) * 64;
  if (fault == EARLY_EXIT && t == 5) return;
  const i64 last = count - 1;
  if (fault != UNWRITTEN || t != 3) shared[t] = x[begin + t <= last ? begin + t : last];
  if (fault == BEYOND_SHARED) shared[64 + t] = 0;
  if (fault == DIVERGENT && t < 32)
    __syncthreads();
  else if (fault != NO_BARRIER && fault != WARP_ORDER && fault != SHUFFLE_IS_NO_BARRIER)
    __syncthreads();
  if (fault == WARP_ORDER) __syncwarp();  // the other warp's values are needed
  if (fault == SHUFFLE_IS_NO_BARRIER) __shfl_sync(ALL, t, 0);
  if (fault == HALF_SHUFFLE && t % 32 < 16) __shfl_sync(ALL, t, 0);
  float value = shared[fault == SHUFFLE_IS_NO_BARRIER ? t / 32 * 32 + 31 - t % 32 : 63 - t];
  if (fault == OVERWRITTEN) shared[t] = 0;
  if (fault == MISALIGNED && t == 0) value += load_vector<false, Vector<float, 4>>(x + 1).at[0];
  const i64 to = fault == OTHER_BLOCK ? t : begin + t;
  if (to < count + (fault == BEYOND_TENSOR)) y[to] = value;
}

void fault(const char* name, uintptr_t x, uintptr_t y, i64 count) {
  static const char* const names[] = {"", "no barrier", "beyond the tensor", "beyond shared memory", "unwritten",
    "misaligned", "divergent", "early exit", "warp order", "other block", "half a shuffle", "a shuffle is no barrier",
    "overwritten", "too large"};
  int found = 0;
  while (strcmp(names[found], name)) ++found;
  launch("fault", fault_kernel, dim3(unsigned(ceil_div(count, 64))), 64, found == TOO_LARGE ? 1 << 20 : 256, 0,
         (const float*)x, (float*)y, count, found);
}

}  // namespace cuda
}  // namespace gpt2fast

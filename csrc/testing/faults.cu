// Kernels with faults that the emulator must find: they prove the emulator. Most faults give right numbers
// where threads run one after another.
#include "testing/faults.h"

#include <cstring>

#include "common/cuda.h"
#include "common/hopper.h"

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

template <size_t N>
static int position(const char* const (&names)[N], const char* name) {
  for (size_t i = 0; i < N; ++i)
    if (!strcmp(names[i], name)) return int(i);
  throw std::runtime_error("no such fault");
}

void fault(const char* name, uintptr_t x, uintptr_t y, i64 count) {
  static const char* const names[] = {"", "no barrier", "beyond the tensor", "beyond shared memory", "unwritten",
    "misaligned", "divergent", "early exit", "warp order", "other block", "half a shuffle", "a shuffle is no barrier",
    "overwritten", "too large"};
  const int found = position(names, name);
  launch("fault", fault_kernel, dim3(unsigned(ceil_div(count, 64))), 64, found == TOO_LARGE ? 1 << 20 : 256, 0,
         (const float*)x, (float*)y, count, found);
}

// ---- a product of two warps, with two stages of asynchronous copies -------------------------------------

enum ProductFault {
  NO_WAIT = 1, SHORT_WAIT, NO_COMMIT, NO_BARRIER_AFTER_WAIT, OVERWRITTEN_STAGE, MISALIGNED_ROW, MISALIGNED_COPY,
  ROW_NOT_SHARED, HALF_A_WARP, COPY_BEYOND
};

template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c, int depth, bool a_turned, bool b_turned, bool plain,
                               int fault) {
  struct Shared {
    T a[2][32 * 16], b[2][16 * 16];
  };
  Shared& shared = shared_memory<Shared>();
  const int t = threadIdx.x, lane = t % WARP, warp = t / WARP;
  // 8 elements a thread of a stage's tile (rows, columns) of a matrix (height, width) from (top, left) on.
  const auto fetch = [&](T* tile, const T* from, int rows, int columns, int top, int left, int height, int width) {
    const int row = t / (columns / 8), column = t % (columns / 8) * 8;
    if (row >= rows) return;
    int present = top + row < height ? min(max(width - left - column, 0), 8) : 0;
    if (fault == COPY_BEYOND) present = 8;
    const T* place = from + (present ? (top + row) * width + left + column : 0);
    copy_async(tile + row * columns + column, place + (fault == MISALIGNED_COPY), present * int(sizeof(T)));
  };
  const auto stage = [&](int k) {
    const int s = k / 16 % 2;
    if (k < depth) {
      if (a_turned)
        fetch(shared.a[s], a, 16, 32, k, 0, depth, 32);
      else
        fetch(shared.a[s], a, 32, 16, 0, k, 32, depth);
      if (b_turned)
        fetch(shared.b[s], b, 16, 16, k, 0, depth, 16);
      else
        fetch(shared.b[s], b, 16, 16, 0, k, 16, depth);
    }
    if (fault != NO_COMMIT) copy_async_commit();
  };
  float sums[2][4] = {};
  stage(0);
  for (int k = 0; k < depth; k += 16) {
    stage(k + 16);
    if (fault == SHORT_WAIT)
      copy_async_wait<2>();
    else if (fault != NO_WAIT)
      copy_async_wait<1>();
    if (fault != NO_BARRIER_AFTER_WAIT) __syncthreads();
    const T *left = shared.a[k / 16 % 2], *right = shared.b[k / 16 % 2];
    uint32_t x[4], y[4];
    if (plain) {
      const int g = lane / 4, p = lane % 4 * 2;
      const auto pair = [&](const T* tile, int first, int step) {
        return pack<T>(to_float(tile[first]), to_float(tile[first + step]));
      };
      for (int i = 0; i < 4; ++i) {
        const int row = warp * 16 + g + i % 2 * 8, column = p + i / 2 * 8;
        x[i] = a_turned ? pair(left, column * 32 + row, 32) : pair(left, row * 16 + column, 1);
        const int n = g + i / 2 * 8, m = p + i % 2 * 8;
        y[i] = b_turned ? pair(right, m * 16 + n, 16) : pair(right, n * 16 + m, 1);
      }
    } else {
      const int shift = fault == MISALIGNED_ROW;
      if (a_turned)
        ldmatrix_transposed(x, left + (lane % 8 + lane / 16 * 8) * 32 + warp * 16 + lane / 8 % 2 * 8);
      else
        ldmatrix(x, fault == ROW_NOT_SHARED ? a : left + (warp * 16 + lane % 16) * 16 + lane / 16 * 8 + shift);
      if (b_turned)
        ldmatrix_transposed(y, right + lane % 16 * 16 + lane / 16 * 8);
      else
        ldmatrix(y, right + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    }
    if (fault != HALF_A_WARP || lane < 16) mma<T>(sums[0], x, y[0], y[1]);
    mma<T>(sums[1], x, y[2], y[3]);
    if (fault != OVERWRITTEN_STAGE) __syncthreads();
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      c[(warp * 16 + lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
}

void product_fault(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, i64 depth, bool a_turned, bool b_turned,
                   bool plain, int dtype) {
  static const char* const names[] = {"", "no wait", "short wait", "no commit", "no barrier after wait",
    "overwritten stage", "misaligned row", "misaligned copy", "row not shared", "half a warp", "copy beyond"};
  const int found = position(names, name);
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    launch("product_fault", product_kernel<T>, dim3(1), 64, sizeof(T) * 2 * (32 + 16) * 16, 0, (const T*)a,
           (const T*)b, (float*)c, int(depth), a_turned, b_turned, plain, found);
  });
}

// ---- Hopper: a producer's copies, a warpgroup's products, and the result's way back -----------------------

enum HopperFault {
  NO_WAIT_FOR_COPY = 1, WRONG_PHASE, NO_EXPECTATION, TOO_MANY_BYTES, NO_RELEASE, EARLY_RELEASE, ARRIVED_TWICE,
  EARLY_RESULT, UNCOMMITTED, NO_PRODUCT_FENCE, NO_PROXY_FENCE, NO_BARRIER_BEFORE_STORE, STORE_OVERWRITTEN, STORE_LEFT,
  NO_INIT_FENCE, NO_BARRIER_AFTER_INIT, MISPLACED_TILE, PLAIN_OPERAND, HALF_A_WARPGROUP, OTHER_OPERANDS,
  LONELY_BARRIER, COPY_LEFT, ORDER_OF_ROWS, SHORT_STEP
};

template <class T, bool B_TURNED>
__global__ void __launch_bounds__(2 * WARPGROUP)
    hopper_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                  const __grid_constant__ TensorMap c, int depth, int fault) {
#ifdef GPT2FAST_HOPPER
  constexpr int STAGES = 2;
  struct Shared {
    T a[STAGES][64 * 64 + 512], b[STAGES][256 * 64], c[64 * 64];
    Barrier come[STAGES], gone[STAGES];
  };
  Shared& shared = shared_memory<Shared>();
  const int steps = (depth + 63) / 64, t = threadIdx.x % WARPGROUP;
  const int shift = fault == MISPLACED_TILE ? 64 : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.come[i], 1);
      barrier_init(shared.gone[i], 4);
    }
    if (fault != NO_INIT_FENCE) barrier_init_fence();
  }
  if (fault != NO_BARRIER_AFTER_INIT) __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    if (threadIdx.x != 0) return;
    for (int step = 0; step < steps + (fault == COPY_LEFT); ++step) {
      const int stage = step % STAGES;
      barrier_wait(shared.gone[stage], step / STAGES % 2 ^ 1);
      const int bytes = (64 + 256) * 64 * sizeof(T);
      if (fault == NO_EXPECTATION)
        barrier_arrive(shared.come[stage]);
      else
        barrier_expect(shared.come[stage], bytes + (fault == TOO_MANY_BYTES ? 16 : 0));
      tma_load(shared.a[stage] + shift, a, step * 64, 0, shared.come[stage]);
      if (B_TURNED)
        for (int i = 0; i < 4; ++i) tma_load(shared.b[stage] + i * 64 * 64, b, i * 64, step * 64, shared.come[stage]);
      else
        tma_load(shared.b[stage], b, step * 64, 0, shared.come[stage]);
    }
    return;
  }
  float sums[128];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % STAGES;
    if (fault != NO_WAIT_FOR_COPY) barrier_wait(shared.come[stage], step / STAGES % 2 ^ (fault == WRONG_PHASE));
    if (fault != NO_PRODUCT_FENCE) wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
      const int within = fault == SHORT_STEP ? k / 2 : k;
      const uint64_t y = B_TURNED ? wgmma_operand(shared.b[stage] + within * 64, 64 * 64 * sizeof(T))
                                  : wgmma_operand(shared.b[stage] + within);
      const T* left = shared.a[stage] + shift + k;
      const uint64_t x = wgmma_operand(left + (fault == OTHER_OPERANDS && t == 5 ? 16 : 0));
      if (fault == HALF_A_WARPGROUP && t >= 64) continue;
      wgmma<T, B_TURNED>(sums, fault == PLAIN_OPERAND ? x & ~(3ull << 62) : x, y, step > 0 || k > 0);
    }
    if (fault != UNCOMMITTED) wgmma_commit();
    if (fault == EARLY_RELEASE && t % WARP == 0) barrier_arrive(shared.gone[stage]);
    if (fault == EARLY_RESULT) sums[0] += 1;
    wgmma_wait<0>(sums);
    if (fault != NO_RELEASE && fault != EARLY_RELEASE && t % WARP == 0) barrier_arrive(shared.gone[stage]);
    if (fault == ARRIVED_TWICE && t % WARP == 0) barrier_arrive(shared.gone[stage]);
  }
  for (int slice = 0; slice < 4; ++slice) {
    if (t == 0 && fault != STORE_OVERWRITTEN) tma_wait_read<0>();
    named_barrier(1, WARPGROUP);
    for (int i = 0; i < 32; i += 2) {
      const int row = t / WARP * 16 + t % WARP / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2;
      const int at = fault == ORDER_OF_ROWS ? row * 64 + column : in_tile(row, column);
      *(uint32_t*)(shared.c + at) = pack<T>(sums[slice * 32 + i], sums[slice * 32 + i + 1]);
    }
    if (fault != NO_PROXY_FENCE) proxy_fence();
    if (fault == LONELY_BARRIER)
      named_barrier(1, 2 * WARPGROUP);
    else if (fault != NO_BARRIER_BEFORE_STORE)
      named_barrier(1, WARPGROUP);
    if (t == 0) {
      tma_store(c, shared.c, slice * 64, 0);
      tma_commit();
    }
  }
  if (t == 0 && fault != STORE_LEFT) tma_wait_read<0>();
#endif
}

void hopper_fault(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, i64 rows, i64 columns, i64 depth,
                  bool b_turned, int dtype) {
  static const char* const names[] = {"", "no wait for a copy", "wrong phase", "no expectation", "too many bytes",
    "no release", "early release", "arrived twice", "early result", "uncommitted", "no product fence",
    "no proxy fence", "no barrier before store", "store overwritten", "store left", "no init fence",
    "no barrier after init", "misplaced tile", "plain operand", "half a warpgroup", "other operands",
    "lonely barrier", "copy left", "order of rows", "short step"};
  const int found = position(names, name);
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const char* op = "hopper_fault";
    const auto right = b_turned ? tensor_map<T>(op, b, columns, depth, columns, 64)
                                : tensor_map<T>(op, b, depth, columns, depth, 256);
    launch(op, b_turned ? hopper_kernel<T, true> : hopper_kernel<T, false>, dim3(1), 2 * WARPGROUP,
           sizeof(T) * (2 * (64 + 256) * 64 + 2 * 512 + 64 * 64) + 4 * sizeof(Barrier), 0,
           tensor_map<T>(op, a, depth, rows, depth, 64), right, tensor_map<T>(op, c, columns, rows, columns, 64),
           int(depth), found);
  });
}

// ---- Hopper: the left operand in registers, the right one from a tensor of four dimensions ----------------

enum LeftFault { LEFT_OVERWRITTEN = 1, LEFT_WITHOUT_FENCE, LEFT_TURNED, OTHER_MATRIX };

template <class T>
__global__ void __launch_bounds__(WARPGROUP)
    left_kernel(const T* a, const __grid_constant__ TensorMap b, float* c, int fault) {
#ifdef GPT2FAST_HOPPER
  struct Shared {
    T b[64 * 64];
    Barrier come;
  };
  Shared& shared = shared_memory<Shared>();
  const int t = threadIdx.x, row = t / WARP * 16 + t % WARP / 4, column = t % 4 * 2;
  if (t == 0) {
    barrier_init(shared.come, 1);
    barrier_init_fence();
    barrier_expect(shared.come, int(sizeof shared.b));
    tma_load(shared.b, b, 0, 0, fault == OTHER_MATRIX ? 2 : 1, 1, shared.come);
  }
  __syncthreads();
  uint32_t left[4][4];
  for (int i = 0; i < 16; ++i) {
    const int half = fault == LEFT_TURNED ? i / 2 % 2 : i % 2, far = fault == LEFT_TURNED ? i % 2 : i / 2 % 2;
    memcpy(&left[i / 4][i % 4], a + (row + 8 * half) * 64 + i / 4 * 16 + 8 * far + column, sizeof(uint32_t));
  }
  barrier_wait(shared.come, 0);
  float sums[32];
  if (fault != LEFT_WITHOUT_FENCE) wgmma_fence();
  for (int k = 0; k < 64; k += 16) wgmma<T, true>(sums, left[k / 16], wgmma_operand(shared.b + k * 64), k > 0);
  wgmma_commit();
  if (fault == LEFT_OVERWRITTEN) left[2][1] = 0;
  wgmma_wait<0>(sums);
  for (int i = 0; i < 32; ++i) c[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = sums[i];
#endif
}

void left_fault(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, i64 rows, int dtype) {
  static const char* const names[] = {"", "left overwritten", "left without fence", "left turned", "other matrix"};
  const int found = position(names, name);
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto right = tensor_map<T, 4>("left_fault", b, {64, rows, 3, 2}, {3 * 64, 64, 3 * 64 * rows}, 64);
    launch("left_fault", left_kernel<T>, dim3(1), WARPGROUP, sizeof(T) * 64 * 64 + sizeof(Barrier), 0, (const T*)a,
           right, (float*)c, found);
  });
}

}  // namespace cuda
}  // namespace gpt2fast

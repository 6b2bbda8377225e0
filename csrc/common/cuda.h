// What the CUDA kernels share: element types, 16-byte accesses, reductions, how a kernel is launched.
//
// The same sources compile in two ways: with nvcc for GPUs, and with any C++ compiler and
// -DGPT2FAST_EMULATED for the tests' emulator (csrc/testing), which checks every access. To serve both:
//   - shared memory is one struct: `Shared& s = shared_memory<Shared>()`, or an array of bytes given to `launch`;
//   - a kernel is started with `launch`, never with <<<...>>>;
//   - 16-byte accesses go through `load_vector` and `store_vector` (a struct copied by value would become
//     four 4-byte accesses);
//   - instructions that C++ does not have are wrapped here, beside what they mean on a CPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef GPT2FAST_EMULATED
#include "testing/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace gpt2fast {
namespace cuda {

using i64 = int64_t;
using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

// ---- launching ---------------------------------------------------------------------------------------

// Runs `kernel` on a CUDA stream, with `shared` bytes of shared memory; an empty grid does nothing.
// Throws with the op's name where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            uintptr_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef GPT2FAST_EMULATED
  (void)stream;
  const auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  emulator::run(op, (const void*)kernel, grid, threads, shared, std::ref(body));
#else
  cudaError_t error = cudaSuccess;
  if (shared > (48 << 10))
    error = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared, cudaStream_t(stream)>>>(static_cast<Parameters>(arguments)...);
    error = cudaGetLastError();  // also clears it, so that the next launch is not blamed
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("gpt2fast CUDA kernel " + std::string(op) + ": " + cudaGetErrorString(error));
  }
#endif
}

// `body(T())` with T = float, bf16 or f16 for dtype 0, 1, 2.
template <class Body>
void with_dtype(int dtype, const Body& body) {
  if (dtype == 0)
    body(float());
  else if (dtype == 1)
    body(bf16());
  else
    body(f16());
}

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Whether 16-byte accesses are right at every row that starts at `address` + k * `stride` elements.
template <class T>
bool aligned(uintptr_t address, i64 stride) {
  return address % 16 == 0 && stride * i64(sizeof(T)) % 16 == 0;
}

template <class Shared>
__device__ Shared& shared_memory() {
#ifdef GPT2FAST_EMULATED
  return *reinterpret_cast<Shared*>(emulator::shared_memory());
#else
  extern __shared__ __align__(1024) unsigned char gpt2fast_shared[];  // as wgmma and TMA want it
  return *reinterpret_cast<Shared*>(gpt2fast_shared);
#endif
}

// ---- elements ----------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half(x);
}

// SIZE elements that are read and written at once: 16 bytes, or single elements where rows do not start on
// a multiple of 16 bytes.
template <class T, int ELEMENTS>
struct alignas(ELEMENTS * sizeof(T)) Vector {
  static constexpr int SIZE = ELEMENTS;
  T at[ELEMENTS];
};
template <class T>
constexpr int WIDE = 16 / int(sizeof(T));

template <int BYTES>
struct Bits;
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// STREAMED data is used once: it should leave the caches first.
template <bool STREAMED = false, class V, class T>
__device__ __forceinline__ V load_vector(const T* place) {
  V v;
#ifdef GPT2FAST_EMULATED
  emulator::access(place, sizeof v, false, __builtin_return_address(0));
  __builtin_memcpy(&v, place, sizeof v);
#else
  using B = typename Bits<sizeof(V)>::type;
  const B bits = STREAMED ? __ldcs(reinterpret_cast<const B*>(place)) : *reinterpret_cast<const B*>(place);
  memcpy(&v, &bits, sizeof v);
#endif
  return v;
}
template <bool STREAMED = false, class V, class T>
__device__ __forceinline__ void store_vector(T* place, const V& v) {
#ifdef GPT2FAST_EMULATED
  emulator::access(place, sizeof v, true, __builtin_return_address(0));
  __builtin_memcpy(place, &v, sizeof v);
#else
  using B = typename Bits<sizeof(V)>::type;
  B bits;
  memcpy(&bits, &v, sizeof v);
  if (STREAMED)
    __stcs(reinterpret_cast<B*>(place), bits);
  else
    *reinterpret_cast<B*>(place) = bits;
#endif
}

// Makes the compiler forget what it made of v: else it would keep 8 halves as 8 floats, in twice the registers,
// for their next use.
template <class T, int V>
__device__ __forceinline__ void stay_packed(Vector<T, V>& v) {
#ifndef GPT2FAST_EMULATED
  if constexpr (sizeof v == 16) {
    uint4 bits;
    memcpy(&bits, &v, sizeof v);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    memcpy(&v, &bits, sizeof v);
  }
#else
  (void)v;
#endif
}

// ---- arithmetic --------------------------------------------------------------------------------------

// 2^x to two ulp in one instruction; results below 1e-38 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef GPT2FAST_EMULATED
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * 1.44269504f); }
// 1 / x to an ulp in one instruction; 1 / inf is 0.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef GPT2FAST_EMULATED
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- reductions: every thread gets the result, in one fixed order -------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// The sum over a block of WARPS warps. Calls must use different `room`, or have a barrier between them.
template <int WARPS>
__device__ __forceinline__ float block_sum(float x, float (&room)[WARPS]) {
  x = warp_sum(x);
  if (WARPS == 1) return x;
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) total += room[i];
  return total;
}

// Two sums over a block with one barrier.
template <int WARPS>
__device__ __forceinline__ void block_sums(float& x, float& y, float (&room)[2][WARPS]) {
  x = warp_sum(x);
  y = warp_sum(y);
  if (WARPS == 1) return;
  if (threadIdx.x % WARP == 0) {
    room[0][threadIdx.x / WARP] = x;
    room[1][threadIdx.x / WARP] = y;
  }
  __syncthreads();
  x = y = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    x += room[0][i];
    y += room[1][i];
  }
}

// ---- random words ------------------------------------------------------------------------------------
// A hash of (seed, b, h, i, j), that of gpt2fast/ops/random.py. Dropout keeps element (i, j) of head (b, h) where
// the first 24 bits are >= `threshold`.

__device__ __forceinline__ uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

struct RandomRow {
  uint32_t first, second;
  __device__ RandomRow() : first(0), second(0) {}
  __device__ RandomRow(i64 seed, uint32_t b, uint32_t h, uint32_t row) {
    const uint32_t start = scramble(uint32_t(seed) + 0x9e3779b9u) ^ uint32_t(uint64_t(seed) >> 32);
    first = scramble(scramble(scramble(scramble(start) + b) + h) ^ row);
    second = scramble(scramble(scramble(scramble(start ^ 0x85ebca6bu) + b) + h) + row * 0x9e3779b9u);
  }
  __device__ uint32_t word(uint32_t column) const {
    uint32_t x = column * 0x9e3779b9u + first;
    x = ((x ^ (x >> 16)) * 0x7feb352du) ^ second;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
  __device__ bool kept(uint32_t column, int threshold) const { return int(word(column) >> 8) >= threshold; }
};

}  // namespace cuda
}  // namespace gpt2fast

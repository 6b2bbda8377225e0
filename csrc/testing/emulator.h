// Runs the CUDA kernels on a CPU and checks what they do to memory. Test code: never in the wheel.
//
// Blocks run one after another. A thread of a block is a fiber, which runs until it meets a barrier or a
// warp operation. Kernel sources are compiled with -fsanitize=thread, which makes the compiler report every
// load and store, but linked with emulator.cpp instead of that sanitizer. An access is wrong if it
//   - is outside of every tensor given to the op and of the block's shared memory;
//   - is not aligned to its size (16-byte accesses);
//   - reads shared memory that nobody wrote in this block;
//   - meets another thread's access to the same element, one of them a write, with no barrier between
//     them: __syncthreads within a block, __syncwarp (not a shuffle) within a warp, nothing between blocks;
//   - is to shared memory that an asynchronous copy fills, before the copying thread has waited for it.
// Also found: barriers and warp operations that not all threads reach, and deadlocks. The first complaints are thrown as an
// exception with the op's name, and Python raises it.
//
// On Hopper's instructions (testing/hopper.inc) it is wrong
//   - to touch accumulators before their product is waited for, or to write a left operand's registers; to start
//     a product without wgmma's fence;
//   - to write what a product or a tensor copy under way reads, or what others have read, with no chain of
//     barriers in between (mbarriers and named barriers included; arrivals are compared thread by thread);
//   - to read what has not arrived, or has with no wait for its barrier's phase; copies arrive as late as can be;
//   - to give a product or a copy what a thread wrote without its fence between proxies;
//   - to use an operand that does not lie in tiles of 128 swizzled bytes, a barrier before its initialisation is
//     known, more arrivals or bytes than its phase expects; to arrive twice where it need not be in two phases; to
//     wait for a phase that never ends;
//   - to end with a product or a copy under way.
// Operands are read where their descriptors say, with the swizzle, so that a wrong layout gives wrong numbers.
//
// What it cannot show: time; faults of nvcc, ptxas or in the lines for nvcc only (#else of GPT2FAST_EMULATED);
// the last bits of approximate instructions (ex2.approx, rcp.approx are exact here), of fused multiply-adds
// and of the tensor cores' sums; bank conflicts; reads of uninitialised global memory; accesses beyond a member of a struct of shared memory
// but within it; whether registers and shared memory suffice (benchmarks/cuda_report.py shows that);
// memory that becomes visible late between concurrent blocks; an illegal stream or device. Of Hopper's: what the
// driver refuses in a tensor map; a compiler that serialises products or moves accumulators (cuda_report.py reads
// ptxas's log); a missing fence where a reader's or copy's place is written by a copy next; registers that setmaxnreg
// gives and takes; clusters and multicast, which no kernel has; whether real latencies leave room for a phase to
// be missed, since a wait here sees the phase of its parity as soon as it ends.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- the language ------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// CUDA's names, so that kernels have the same symbols in both builds.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest even; NaN stays one
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half(float x) { return {_Float16(x)}; }

namespace emulator {

struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
};
extern Thread* current;  // null outside of kernels

void run(const char* op, const void* kernel, dim3 grid, int threads, size_t shared,
         const std::function<void()>& body);
void* shared_memory();
void access(const void* place, size_t bytes, bool write, const void* caller);
// Threads meet at one barrier, or in one warp operation, if they come from the same `line`.
void block_barrier(int line, const void* caller);
// All lanes of `mask` bring a value and get the one that lane `from` brought.
uint64_t exchange(unsigned mask, uint64_t value, int from, int line, const void* caller);
void warp_barrier(unsigned mask, int line, const void* caller);
int lane();
// Tensor-core instructions of a whole warp, whose lanes have fragments as in the PTX ISA, section 9.7.14:
// c (16 x 8) += a (16 x 16) b (16 x 8), and four 8 x 8 matrices whose rows the lanes name.
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16, int line, const void* caller);
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, int line, const void* caller);
// 16 bytes to shared memory, `bytes` of them from `from` and then zeros. They are there when their thread has
// waited for their group, and nobody may touch the place before.
void copy_async(void* to, const void* from, int bytes, const void* caller);
void copy_async_commit();
void copy_async_wait(int groups, const void* caller);
void atomic_access(const void* place, size_t bytes, const void* caller);

// Hopper (csrc/common/hopper.h). A product's operands are read when it starts and must stay until it is waited
// for; then d gets its values. Copies to shared memory arrive when no thread can run.
struct TensorMap {
  uintptr_t address;
  int64_t sizes[4], strides[4];  // columns, rows, two dimensions more; strides: bytes, from a row on
  int box_rows;
};
struct TilePlace {
  int at[4];  // column, row, ...
};
struct Operands {
  uint64_t a;
  const uint32_t* registers;  // instead of a
  uint64_t b;
};
uint32_t shared_address(const void* place);
void proxy_fence();
void barrier_init(void* place, int count, const void* caller);
void barrier_arrive(void* place, int bytes, const void* caller);
void barrier_wait(void* place, int parity, const void* caller);
void named_barrier(int id, int count, const void* caller);
void tma_load(void* to, const TensorMap& map, TilePlace place, void* barrier, const void* caller);
void tma_store(const TensorMap& map, const void* from, TilePlace place, const void* caller);
void tma_commit();
void tma_wait_read(int groups);
void wgmma_fence();
void wgmma(float* d, int count, const Operands& operands, bool b_turned, bool accumulate, bool is_bf16, int line,
           const void* caller);
void wgmma_commit();
void wgmma_wait(int groups, int line, const void* caller);

template <class T>
T shuffle(unsigned mask, T value, int from, int line, const void* caller) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, from, line, caller);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread_index)
#define blockIdx (emulator::current->block_index)
#define blockDim (emulator::current->block_size)
#define gridDim (emulator::current->grid_size)
#define EMULATOR_HERE __builtin_return_address(0)
#define EMULATOR_LINE int line = __builtin_LINE()
#define EMULATOR_CALL inline __attribute__((noinline))

EMULATOR_CALL void __syncthreads(EMULATOR_LINE) { emulator::block_barrier(line, EMULATOR_HERE); }
EMULATOR_CALL void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_LINE) {
  emulator::warp_barrier(mask, line, EMULATOR_HERE);
}
template <class T>
EMULATOR_CALL T __shfl_sync(unsigned mask, T value, int from, EMULATOR_LINE) {
  return emulator::shuffle(mask, value, from & 31, line, EMULATOR_HERE);
}
template <class T>
EMULATOR_CALL T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATOR_LINE) {
  return emulator::shuffle(mask, value, emulator::lane() ^ bits, line, EMULATOR_HERE);
}
template <class T>
EMULATOR_CALL T __shfl_down_sync(unsigned mask, T value, int by, EMULATOR_LINE) {
  const int from = emulator::lane() + by;
  return emulator::shuffle(mask, value, from < 32 ? from : emulator::lane(), line, EMULATOR_HERE);
}
template <class T>
EMULATOR_CALL T __shfl_up_sync(unsigned mask, T value, int by, EMULATOR_LINE) {
  const int from = emulator::lane() - by;
  return emulator::shuffle(mask, value, from >= 0 ? from : emulator::lane(), line, EMULATOR_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= unsigned(__shfl_sync(mask, predicate != 0, i)) << i;
  return votes;
}
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* place, T value) {
  emulator::atomic_access(place, sizeof(T), EMULATOR_HERE);
  const T before = *place;
  *place = before + value;
  return before;
}
inline void __threadfence() {}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

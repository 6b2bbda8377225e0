// What Hopper (sm_90a) has beside sm_80's tensor cores: products of a warpgroup (wgmma), copies of tiles by one
// thread (TMA), barriers in shared memory that count arrivals and bytes (mbarrier), and registers that warps
// give to others (setmaxnreg).
//
// A tile is rows of 128 bytes (64 elements), whose 16-byte pieces are permuted by the row's number: piece c of row
// r lies at c ^ (r % 8), in groups of 8 rows that begin at multiples of 1024 bytes. TMA writes and reads it so,
// and wgmma knows it as "128-byte swizzle". Descriptors, fragments and the order that is asked for: PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate", "Tensor Map", "mbarrier", "Async proxy".
//
//   result    in lane l of warp w of a warpgroup, d[4 j + e] is row 16 w + l / 4 (+ 8 for e >= 2), column
//             8 j + 2 (l % 4) + e % 2.
//   left      operand in registers: a warp's 16 rows as for mma.sync, so that d[8 k + 2 i] and its neighbour make
//             a[i] of columns 16 k on.
//   products  wgmma_fence(), products, wgmma_commit(), wgmma_wait<N>(): until that, neither the results nor the
//             operands may be touched. N: the groups, the last ones, that may still be under way.
//   barriers  barrier_wait(b, parity) returns once the phase of that parity is over: 0, 1, 0, ... A phase is over
//             after `count` arrivals and all bytes that barrier_expect named. Before the first one, parity 1
//             is over.
//   proxies   what a thread has written, TMA and wgmma see after its proxy_fence() and a barrier.
#pragma once
#include "common/mma.h"

#ifndef GPT2FAST_EMULATED
#include <cuda.h>  // types only: the driver's function is found at run time, so that nothing links it
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GPT2FAST_EMULATED)
#define GPT2FAST_HOPPER 1
#endif

namespace gpt2fast {
namespace cuda {

constexpr int WARPGROUP = 128;
constexpr int TILE_COLUMNS = 64;  // elements of a tile's row

struct Barrier {
  uint64_t state;
};

// ---- tensor maps: what TMA knows of a matrix in global memory -------------------------------------------

#ifdef GPT2FAST_EMULATED
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Describes RANK - 2 dimensions of (rows, columns) matrices of 16-bit elements, which are moved in tiles of
// box_rows x 64. sizes: columns, rows, further dimensions; strides: from a row on.
template <class T, int RANK>
TensorMap tensor_map(const char* op, uintptr_t address, const i64 (&sizes)[RANK], const i64 (&strides)[RANK - 1],
                     int box_rows) {
#ifdef GPT2FAST_EMULATED
  (void)op;
  TensorMap map{address, {1, 1, 1, 1}, {}, box_rows};
  for (int i = 0; i < RANK; ++i) map.sizes[i] = sizes[i];
  for (int i = 1; i < RANK; ++i) map.strides[i] = strides[i - 1] * i64(sizeof(T));
  return map;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return Encode(found);
  }();
  TensorMap map;
  cuuint64_t counts[RANK], bytes[RANK - 1];
  cuuint32_t box[RANK], steps[RANK];
  for (int i = 0; i < RANK; ++i) {
    counts[i] = cuuint64_t(sizes[i]);
    if (i > 0) bytes[i - 1] = cuuint64_t(strides[i - 1]) * sizeof(T);
    box[i] = i == 0 ? TILE_COLUMNS : i == 1 ? cuuint32_t(box_rows) : 1;
    steps[i] = 1;
  }
  constexpr auto type =
      std::is_same<T, bf16>::value ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode ? encode(&map, type, RANK, (void*)address, counts, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             : CUDA_ERROR_NOT_FOUND;
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("gpt2fast CUDA kernel " + std::string(op) + ": the driver refuses a tensor map, error " +
                             std::to_string(int(result)));
  return map;
#endif
}
template <class T>
TensorMap tensor_map(const char* op, uintptr_t address, i64 stride, i64 rows, i64 columns, int box_rows) {
  return tensor_map<T, 2>(op, address, {columns, rows}, {stride}, box_rows);
}

#ifdef GPT2FAST_HOPPER

// Where (row, column) lies in a tile.
__device__ __forceinline__ int in_tile(int row, int column) {
  return row * TILE_COLUMNS + ((column / 8 ^ row % 8) * 8) + column % 8;
}

// Describes an operand that begins at `tile`. `between`: bytes from one tile to the next in a row of tiles, of an
// operand that has K down the rows and is wider than a tile.
__device__ __forceinline__ uint64_t wgmma_operand(const void* tile, unsigned between = 16) {
  return uint64_t(shared_address(tile)) >> 4 | uint64_t(between >> 4) << 16 | uint64_t(1024 >> 4) << 32 | 1ull << 62;
}

#ifdef GPT2FAST_EMULATED

EMULATOR_CALL void barrier_init(Barrier& b, int count) { emulator::barrier_init(&b, count, EMULATOR_HERE); }
inline void barrier_init_fence() { emulator::proxy_fence(); }
EMULATOR_CALL void barrier_arrive(Barrier& b) { emulator::barrier_arrive(&b, 0, EMULATOR_HERE); }
EMULATOR_CALL void barrier_expect(Barrier& b, int bytes) { emulator::barrier_arrive(&b, bytes, EMULATOR_HERE); }
EMULATOR_CALL void barrier_wait(Barrier& b, int parity) { emulator::barrier_wait(&b, parity, EMULATOR_HERE); }
EMULATOR_CALL void named_barrier(int id, int threads) { emulator::named_barrier(id, threads, EMULATOR_HERE); }
EMULATOR_CALL void tma_load(void* to, const TensorMap& map, int column, int row, Barrier& b) {
  emulator::tma_load(to, map, {column, row, 0, 0}, &b, EMULATOR_HERE);
}
EMULATOR_CALL void tma_load(void* to, const TensorMap& map, int column, int row, int third, int fourth, Barrier& b) {
  emulator::tma_load(to, map, {column, row, third, fourth}, &b, EMULATOR_HERE);
}
EMULATOR_CALL void tma_store(const TensorMap& map, const void* from, int column, int row) {
  emulator::tma_store(map, from, {column, row, 0, 0}, EMULATOR_HERE);
}
EMULATOR_CALL void tma_store(const TensorMap& map, const void* from, int column, int row, int third, int fourth) {
  emulator::tma_store(map, from, {column, row, third, fourth}, EMULATOR_HERE);
}
inline void tma_commit() { emulator::tma_commit(); }
template <int GROUPS>
inline void tma_wait_read() {
  emulator::tma_wait_read(GROUPS);
}
inline void proxy_fence() { emulator::proxy_fence(); }
template <int REGISTERS>
inline void give_registers() {}
template <int REGISTERS>
inline void take_registers() {}
inline void wgmma_fence() { emulator::wgmma_fence(); }
template <class T, bool B_TURNED, int N>
EMULATOR_CALL void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool accumulate, EMULATOR_LINE) {
  emulator::wgmma(d, N, {a, nullptr, b}, B_TURNED, accumulate, std::is_same<T, bf16>::value, line, EMULATOR_HERE);
}
template <class T, bool B_TURNED, int N>
EMULATOR_CALL void wgmma(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMULATOR_LINE) {
  emulator::wgmma(d, N, {0, a, b}, B_TURNED, accumulate, std::is_same<T, bf16>::value, line, EMULATOR_HERE);
}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int GROUPS>
EMULATOR_CALL void wgmma_wait(EMULATOR_LINE) {
  emulator::wgmma_wait(GROUPS, line, EMULATOR_HERE);
}
template <int GROUPS, int N>
EMULATOR_CALL void wgmma_wait(float (&)[N], EMULATOR_LINE) {
  emulator::wgmma_wait(GROUPS, line, EMULATOR_HERE);
}

#else

// By one thread; then barrier_init_fence() and a barrier of the block.
__device__ __forceinline__ void barrier_init(Barrier& b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(&b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(&b)) : "memory");
}
// Arrives, and makes the phase wait for so many bytes more.
__device__ __forceinline__ void barrier_expect(Barrier& b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(&b)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(Barrier& b, int parity) {
  uint32_t over = 0;
  while (!over)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(shared_address(&b)), "r"(parity)
                 : "memory");
}
// A barrier of `threads` threads in whole warps; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// Starts the copy of the tiles' part that begins at (row, column), 0 outside of the matrix. `b` counts the bytes.
// With the places in further dimensions where the map has them.
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, int column, int row, Barrier& b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      :
      : "r"(shared_address(to)), "l"(&map), "r"(shared_address(&b)), "r"(column), "r"(row)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, int column, int row, int third, int fourth,
                                         Barrier& b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      :
      : "r"(shared_address(to)), "l"(&map), "r"(shared_address(&b)), "r"(column), "r"(row), "r"(third), "r"(fourth)
      : "memory");
}
// The other way; what is outside of the matrix is left out. It ends with tma_commit and tma_wait_read.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               :
               : "l"(&map), "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* from, int column, int row, int third,
                                          int fourth) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               :
               : "l"(&map), "r"(shared_address(from)), "r"(column), "r"(row), "r"(third), "r"(fourth)
               : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's stores but those of the last GROUPS groups have read shared memory.
template <int GROUPS>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
}
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// By all warps of a warpgroup: from now on a thread has so many registers.
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
#define GPT2FAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GPT2FAST_D16(i) GPT2FAST_D4(i), GPT2FAST_D4(i + 4), GPT2FAST_D4(i + 8), GPT2FAST_D4(i + 12)
#define GPT2FAST_D32(i) GPT2FAST_D16(i), GPT2FAST_D16(i + 16)
#define GPT2FAST_D64(i) GPT2FAST_D32(i), GPT2FAST_D32(i + 32)
#define GPT2FAST_LIST32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "    \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define GPT2FAST_LIST64                                                                                               \
  GPT2FAST_LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GPT2FAST_LIST128                                                                                              \
  GPT2FAST_LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "     \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "      \
  "%122, %123, %124, %125, %126, %127"
// columns: of b; a, b: their operands; accumulate: which operand says so; options: which signs and orders.
#define GPT2FAST_WGMMA(columns, type, list, a, b, accumulate, options)                                                \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                                             \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" list "}, " a ", " b ", p, " options ";\n}"
// d (64 x 2 N) = a (64 x 16) b (16 x 2 N), added to d where it is to accumulate; N is 64 or 128. a has K along the
// rows; b too, as (2 N, 16), or down them where B_TURNED.
template <class T, bool B_TURNED, int N>
__device__ __forceinline__ void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128, "a product that is not here");
  constexpr bool BF16 = std::is_same<T, bf16>::value;
#define GPT2FAST_CASE(type)                                                                                           \
  if constexpr (N == 128)                                                                                             \
    asm volatile(GPT2FAST_WGMMA("256", type, GPT2FAST_LIST128, "%128", "%129", "%130", "1, 1, 0, %131")               \
                 : GPT2FAST_D64(0), GPT2FAST_D64(64)                                                                  \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(B_TURNED)));                                         \
  else                                                                                                                \
    asm volatile(GPT2FAST_WGMMA("128", type, GPT2FAST_LIST64, "%64", "%65", "%66", "1, 1, 0, %67")                    \
                 : GPT2FAST_D64(0)                                                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(B_TURNED)))
  if constexpr (BF16) {
    GPT2FAST_CASE("bf16");
  } else {
    GPT2FAST_CASE("f16");
  }
#undef GPT2FAST_CASE
}
// The same with a in registers, which stay as they are until the product is waited for.
template <class T, bool B_TURNED>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#define GPT2FAST_CASE(type)                                                                                           \
  asm volatile(GPT2FAST_WGMMA("64", type, GPT2FAST_LIST32, "{%32, %33, %34, %35}", "%36", "%37", "1, 1, %38")         \
               : GPT2FAST_D32(0)                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(B_TURNED)))
  if constexpr (std::is_same<T, bf16>::value)
    GPT2FAST_CASE("bf16");
  else
    GPT2FAST_CASE("f16");
#undef GPT2FAST_CASE
}
#undef GPT2FAST_WGMMA
#undef GPT2FAST_LIST128
#undef GPT2FAST_LIST64
#undef GPT2FAST_LIST32
#undef GPT2FAST_D64
#undef GPT2FAST_D32
#undef GPT2FAST_D16
#undef GPT2FAST_D4
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
// With these groups d comes, which the compiler must not read before.
template <int GROUPS, int N>
__device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
  wgmma_wait<GROUPS>();
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#endif
#endif

}  // namespace cuda
}  // namespace gpt2fast

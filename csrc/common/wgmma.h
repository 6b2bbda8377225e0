// Hopper's tensor cores: products of a warpgroup (4 warps) whose operands lie in shared memory (wgmma, sm_90a).
//
// Operands are tiles of 16-bit elements with rows of 128 bytes, whose 16-byte pieces are permuted by the row's
// number: piece c of row r lies at c ^ (r % 8), in groups of 8 rows that start at multiples of 1024 bytes. With K
// along the rows a tile may have any number of them; with K down the rows, a tile that is wider than 64 elements
// is a row of such tiles. Layout of descriptors and results: PTX ISA, "Asynchronous Warpgroup Level Matrix".
//
// In lane l of warp w: d[4 j + e] is row 16 w + l / 4 (+ 8 for e >= 2), column 8 j + 2 (l % 4) + e % 2.
//
// Order: all threads see their copies arrive, wgmma_proxy_fence(), a barrier, wgmma_begin(), products,
// wgmma_commit(), wgmma_wait(). Until then neither the results nor the operands may be touched.
#pragma once
#include "common/mma.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GPT2FAST_EMULATED)
#define GPT2FAST_WGMMA 1
#endif

namespace gpt2fast {
namespace cuda {

// Describes a tile. `between`: bytes from one tile of a row of tiles to the next.
__device__ __forceinline__ uint64_t wgmma_tile(const void* tile, unsigned between = 0) {
  return uint64_t(shared_address(tile)) >> 4 | uint64_t(between >> 4) << 16 | uint64_t(1024 >> 4) << 32 | 1ull << 62;
}

#ifdef GPT2FAST_EMULATED

template <class T, bool B_TURNED>
EMULATOR_CALL void wgmma(float (&d)[64], uint64_t a, uint64_t b, EMULATOR_LINE) {
  emulator::wgmma(d, a, b, B_TURNED, std::is_same<T, bf16>::value, line, EMULATOR_HERE);
}
template <int N>
void wgmma_begin(float (&)[N][64]) {}
inline void wgmma_proxy_fence() { emulator::proxy_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int N>
EMULATOR_CALL void wgmma_wait(float (&)[N][64], EMULATOR_LINE) {
  emulator::wgmma_wait(line, EMULATOR_HERE);
}

#elif defined(GPT2FAST_WGMMA)

// d (64 x 128) += a (64 x 16) b (16 x 128); a with K along the rows, b too, or down them where B_TURNED.
#define GPT2FAST_WGMMA_ASM(type)                                                                              \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                        \
      "{%0,%1,%2,%3,%4,%5,%6,%7,"                                                                             \
      " %8,%9,%10,%11,%12,%13,%14,%15,"                                                                       \
      " %16,%17,%18,%19,%20,%21,%22,%23,"                                                                     \
      " %24,%25,%26,%27,%28,%29,%30,%31,"                                                                     \
      " %32,%33,%34,%35,%36,%37,%38,%39,"                                                                     \
      " %40,%41,%42,%43,%44,%45,%46,%47,"                                                                     \
      " %48,%49,%50,%51,%52,%53,%54,%55,"                                                                     \
      " %56,%57,%58,%59,%60,%61,%62,%63}, "                                                                   \
      "%64, %65, p, 1, 1, 0, %66;\n}"                                                                            \
      :                                                                                                       \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),       \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),\
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),\
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),\
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),\
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),\
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])\
      : "l"(a), "l"(b), "n"(int(B_TURNED)))
template <class T, bool B_TURNED>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same<T, bf16>::value)
    GPT2FAST_WGMMA_ASM("bf16");
  else
    GPT2FAST_WGMMA_ASM("f16");
}
#undef GPT2FAST_WGMMA_ASM

// The compiler must not move what it does with the results to the other side.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N][64]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 64; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
}
// From here on the registers of d belong to the products.
template <int N>
__device__ __forceinline__ void wgmma_begin(float (&d)[N][64]) {
  wgmma_hold(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Makes this thread's writes to shared memory, its arrived copies among them, visible to products.
__device__ __forceinline__ void wgmma_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait(float (&d)[N][64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  wgmma_hold(d);
}

#endif

}  // namespace cuda
}  // namespace gpt2fast

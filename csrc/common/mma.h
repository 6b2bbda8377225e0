// Tensor cores (mma.sync, fp32 sums of bf16 or fp16 products), the loads of their fragments, and asynchronous
// copies to shared memory: what sm_80 has and later GPUs keep.
//
// Layout of fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix"), in lane l with g = l / 4
// and p = 2 (l % 4); a register holds two neighbours, the first one in its low half:
//   a[i]  rows g + 8 (i % 2), columns p, p + 1 (+ 8 for i >= 2)    A is 16 x 16
//   b[i]  rows (of k) p, p + 1 (+ 8 for i = 1), column g           B is 16 x 8
//   c[i]  row g (+ 8 for i >= 2), column p + i % 2                 C is 16 x 8
// ldmatrix: lanes 8 m to 8 m + 7 name the rows of 8 x 8 matrix m, 16 bytes each. r[m] gets row g, columns p and
// p + 1 of it; transposed, rows p and p + 1 of column g. Hence with A stored by rows:
//   ldmatrix(a, row l % 16, column 8 (l / 16))
// or by columns
//   ldmatrix_transposed(a, column l % 8 + 8 (l / 16), row 8 (l / 8 % 2))
// and for two neighbouring B's at once (columns 0 to 7: b[0], b[1]; 8 to 15: b[2], b[3])
//   stored by columns (k contiguous):  ldmatrix(b, column l % 8 + 8 (l / 16), k = 8 (l / 8 % 2))
//   stored by rows (k strided):        ldmatrix_transposed(b, k = l % 16, column 8 (l / 16))
//
// fp32 has no tensor cores without TF32's loss of 13 bits: it stays with plain multiply-adds or cuBLAS.
#pragma once
#include <type_traits>

#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

// `body(T())` with T = bf16 or f16 for dtype 1, 2.
template <class Body>
void with_half_dtype(int dtype, const Body& body) {
  if (dtype == 1)
    body(bf16());
  else
    body(f16());
}

// Two floats rounded to T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
#ifdef GPT2FAST_EMULATED
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  __builtin_memcpy(&bits, pair, sizeof bits);
#else
  if constexpr (std::is_same<T, bf16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
#endif
  return bits;
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t bits, float& low, float& high) {
  T pair[2];
  memcpy(pair, &bits, sizeof bits);
  low = to_float(pair[0]);
  high = to_float(pair[1]);
}

__device__ __forceinline__ uint32_t shared_address(const void* place) {
#ifdef GPT2FAST_EMULATED
  return emulator::shared_address(place);
#else
  return uint32_t(__cvta_generic_to_shared(place));
#endif
}

#ifdef GPT2FAST_EMULATED

template <class T>
EMULATOR_CALL void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_LINE) {
  const uint32_t b[2] = {b0, b1};
  emulator::mma(c, a, b, std::is_same<T, bf16>::value, line, EMULATOR_HERE);
}
EMULATOR_CALL void ldmatrix(uint32_t (&r)[4], const void* row, EMULATOR_LINE) {
  emulator::ldmatrix(r, row, false, line, EMULATOR_HERE);
}
EMULATOR_CALL void ldmatrix_transposed(uint32_t (&r)[4], const void* row, EMULATOR_LINE) {
  emulator::ldmatrix(r, row, true, line, EMULATOR_HERE);
}
EMULATOR_CALL void copy_async(void* to, const void* from, int bytes) {
  emulator::copy_async(to, from, bytes, EMULATOR_HERE);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int GROUPS>
EMULATOR_CALL void copy_async_wait() {
  emulator::copy_async_wait(GROUPS, EMULATOR_HERE);
}

#else

// c += a b, by a whole warp.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, bf16>::value)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements, by a whole warp; `row` is a multiple of 16 bytes in shared memory.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a copy of 16 bytes to shared memory: `bytes` from global memory, zeros after them; with 0 nothing is
// read. Both addresses are multiples of 16 bytes.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// Ends a group of this thread's copies, which may be empty.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the last GROUPS groups. Other threads see them after a barrier.
template <int GROUPS>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#endif

}  // namespace cuda
}  // namespace gpt2fast

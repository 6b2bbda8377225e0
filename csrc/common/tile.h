// Register tiles of a matrix product, and what packs their operands: attention and the matrix products are made of them.
#pragma once
#include "common/simd.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr int MR = VL == 16 ? 8 : 6, NV = 2, NR = NV * VL;  // 12 of 16 registers, 16 of 32 with AVX-512

GPT2FAST_INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
GPT2FAST_INLINE i64 larger(i64 a, i64 b) { return a < b ? b : a; }
GPT2FAST_INLINE i64 clamp(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }
GPT2FAST_INLINE i64 up(i64 x, i64 multiple) { return (x + multiple - 1) / multiple * multiple; }

GPT2FAST_INLINE void zero(float* p, i64 count) {
  for (i64 c = 0; c < count; c += VL) store(p + c, vf{});
}

// Pieces of a workspace, each on its own cache lines.
struct Arena {
  float* next;
  float* take(i64 count) {
    float* piece = next;
    next += up(count, 16);
    return piece;
  }
};

// C (MR x NR) = A B, or factor * C + A B with one factor per row. A is (MR x depth) with rows a_stride apart,
// or, ACROSS, its transpose is. The sum runs over the depth in order from 0 and meets C last: the same bits
// wherever the tile lies.
template <bool ACROSS, bool ADD>
static __attribute__((noinline)) void tile(i64 depth, const float* __restrict a, i64 a_stride,
                                           const float* __restrict b, i64 b_stride, float* __restrict c,
                                           i64 c_stride, const float* factor) {
  vf sum[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) sum[r][0] = sum[r][1] = vf{};
#pragma GCC unroll 2
  for (i64 k = 0; k < depth; ++k) {
    const vf first = load(b + k * b_stride), second = load(b + k * b_stride + VL);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vf x = splat(ACROSS ? a[k * a_stride + r] : a[r * a_stride + k]);
      sum[r][0] += x * first;
      sum[r][1] += x * second;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    float* row = c + r * c_stride;
    if (ADD) {
      const vf f = splat(factor ? factor[r] : 1.0f);
      store(row, load(row) * f + sum[r][0]);
      store(row + VL, load(row + VL) * f + sum[r][1]);
    } else {
      store(row, sum[r][0]);
      store(row + VL, sum[r][1]);
    }
  }
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  typedef Lanes<I...> type;
};
// Lanes of a and b put together: index VL + i is lane i of b.
#if defined(__clang__) || __GNUC__ >= 12
#define GPT2FAST_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, index...)
#else
#define GPT2FAST_SHUFFLE(a, b, index) __builtin_shuffle(a, b, vi{index...})
#endif
template <int W, int... I>
GPT2FAST_INLINE vf exchange_low(vf a, vf b, Lanes<I...>) {
  return GPT2FAST_SHUFFLE(a, b, ((I & W) ? VL + I - W : I));
}
template <int W, int... I>
GPT2FAST_INLINE vf exchange_high(vf a, vf b, Lanes<I...>) {
  return GPT2FAST_SHUFFLE(a, b, ((I & W) ? VL + I : I + W));
}
template <int W>
GPT2FAST_INLINE void exchange(vf (&x)[VL]) {
  typedef typename MakeLanes<VL>::type All;
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i)
    if (!(i & W)) {
      const vf a = x[i], b = x[i + W];
      x[i] = exchange_low<W>(a, b, All());
      x[i + W] = exchange_high<W>(a, b, All());
    }
}
GPT2FAST_INLINE void transpose(vf (&x)[VL]) {
  if constexpr (VL > 8) exchange<8>(x);
  if constexpr (VL > 4) exchange<4>(x);
  exchange<2>(x);
  exchange<1>(x);
}

// Lane i of the result is the sum of the lanes of x[i]: pairs first, then pairs of pairs.
template <int W>
GPT2FAST_INLINE void add_across(vf (&x)[VL]) {
  typedef typename MakeLanes<VL>::type All;
#pragma GCC unroll 16
  for (int i = 0; i < VL; i += 2 * W) x[i] = exchange_low<W>(x[i], x[i + W], All()) + exchange_high<W>(x[i], x[i + W], All());
}
GPT2FAST_INLINE vf lane_sums(vf (&x)[VL]) {
  add_across<1>(x);
  add_across<2>(x);
  if constexpr (VL > 4) add_across<4>(x);
  if constexpr (VL > 8) add_across<8>(x);
  return x[0];
}

// Rows to panels of NR rows, each transposed: to[panel][d][NR]; missing rows are 0.
template <class T>
static void pack_transposed(const T* from, i64 stride, i64 rows, i64 size, float* to) {
  for (i64 r = 0; r < rows; r += NR, to += NR * size)
    for (int part = 0; part < NV; ++part) {
      const i64 first = r + part * VL, count = clamp(rows - first, 0, VL);
      for (i64 d = 0; d < size; d += VL) {
        const i64 n = smaller(VL, size - d);
        vf x[VL];
        if (count == VL && n == VL) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) x[i] = load(from + (first + i) * stride + d);
        } else {
          for (int i = 0; i < VL; ++i)
            x[i] = i < count ? load_at(from + (first + i) * stride + d, n) : vf{};
        }
        transpose(x);
        float* out = to + d * NR + part * VL;
        if (n == VL) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) store(out + i * NR, x[i]);
        } else {
          for (i64 i = 0; i < n; ++i) store(out + i * NR, x[i]);
        }
      }
    }
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

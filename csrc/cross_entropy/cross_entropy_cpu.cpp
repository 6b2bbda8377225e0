// Cross-entropy of rows of logits z with class t, over the first K = `classes` of `columns` columns.
//
//   forward   m = max z,  s = sum exp(z - m),  lse = m + log s
//             loss = (1 - e) (lse - z_t) + e (lse - mean z) + zl lse^2      e label smoothing, zl z-loss
//             logprob = z_t - lse
//   backward  dz_j = u (p_j (1 + 2 zl lse) - e / K - (1 - e) [j = t]),  p_j = exp(z_j - m) / s
//             u the upstream gradient times `factor`; columns K and above get 0, and so do ignored rows
//   source    Szegedy et al. 2016, arXiv:1512.00567 (label smoothing); Chowdhery et al. 2022,
//             arXiv:2204.02311 (z-loss); online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
//   layout    rows of contiguous columns, any row stride; dlogits may be the logits themselves.
//   moves     forward 1 read of the logits; backward 1 read and 1 write. Forward and backward at once read
//             a row from memory, then again from the cache (200 KB in fp32 at GPT-2's vocabulary), and
//             overwrite it. One exp per logit and direction.
//   work      rows are shared out among threads. A row is read in blocks that stay in L1: the block's
//             maximum, the running sum rescaled where the maximum grew, then the block's exp. Block sums
//             are fp32 vectors, their total is a double.
//   saves     m and s in fp32 per row. Not lse alone: at logits of 1e4 its rounding (5e-4) would be the
//             relative error of every p.
#include "common/simd.h"
#include "cross_entropy/cross_entropy_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 BLOCK = 2048;          // columns of a block: 8 KB in fp32
constexpr i64 SHARE_ELEMENTS = 8192;  // logits below which a second thread costs more than it brings

// exp(x) for x <= 0 or NaN, as vexp but for what only a positive x needs. ZERO: 0 below -87.3, else 1e-38
// there, which is enough in a sum that has a 1.
template <bool ZERO>
GPT2FAST_INLINE vf exp_nonpositive(vf x) {
  const vf clamped = vmax(splat(-87.33654f), x);  // this order keeps a NaN in x
  const vf shifted = clamped * 1.44269504f + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  const vf r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  vf p = splat(0.001381459878757596f);
  p = p * r + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + r + 1.0f;
  // n is at least -126, so 2^n is a normal number made of its exponent alone.
  const vf result = p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return ZERO ? select(x < -87.33654f, vf{}, result) : result;
}

// ---- a row ------------------------------------------------------------------------------------------

struct Row {
  float max;
  float sum;
  double log_sum;
  double mean;  // of the logits less `shift`; 0 unless asked for
  double shift;
};

template <bool MEAN, class T>
static Row read_row(const T* z, i64 classes, i64 target) {
  const float at_target = get(z + target);
  // The mean is taken of z - z_t, so that large logits cancel before they are summed.
  const float shift = __builtin_isfinite(at_target) ? at_target : 0.0f;
  float max = -__builtin_inff();
  double sum = 0, plain = 0;
  for (i64 begin = 0; begin < classes; begin += BLOCK) {
    const i64 columns = classes - begin < BLOCK ? classes - begin : BLOCK;
    const T* block = z + begin;
    vf highest[4];
    for (vf& h : highest) h = splat(max);
    vf offsets[4] = {};
    i64 c = 0;
    for (; c + 4 * VL <= columns; c += 4 * VL)
      for (int k = 0; k < 4; ++k) {
        const vf x = load(block + c + k * VL);
        highest[k] = vmax(x, highest[k]);  // this order passes a NaN by: it comes back through exp
        if (MEAN) offsets[k] += x - shift;
      }
    for (; c < columns; c += VL) {
      const i64 n = columns - c < VL ? columns - c : i64(VL);
      const vf x = load_at(block + c, n, -__builtin_inff());
      highest[0] = vmax(x, highest[0]);
      if (MEAN) offsets[1] += load_at(block + c, n, shift) - shift;
    }
    if (MEAN) plain += hsum((offsets[0] + offsets[1]) + (offsets[2] + offsets[3]));
    const float before = max;
    max = hmax(vmax(vmax(highest[0], highest[1]), vmax(highest[2], highest[3])));
    if (max == -__builtin_inff()) {  // nothing but -inf and NaN so far: exp(-inf - -inf) would be NaN
      for (c = 0; c < columns; c += VL) {
        const vf x = load_at(block + c, columns - c < VL ? columns - c : i64(VL), 0.0f);
        sum += hsum(select(x != x, x, vf{}));
      }
      continue;
    }
    if (max > before) sum *= vexp(splat(before - max))[0];
    vf sums[4] = {};
    c = 0;
    for (; c + 4 * VL <= columns; c += 4 * VL) {
      for (int k = 0; k < 4; ++k) sums[k] += exp_nonpositive<false>(load(block + c + k * VL) - max);
      // The next block comes from memory while this one computes. Past the row's end it does no harm.
      for (int k = 0; k < 4 * VL * int(sizeof(T)); k += 64)
        __builtin_prefetch((const char*)(block + c + BLOCK) + k);
    }
    for (; c < columns; c += VL) {
      const i64 n = columns - c < VL ? columns - c : i64(VL);
      sums[0] += exp_nonpositive<true>(load_at(block + c, n, -__builtin_inff()) - max);
    }
    sum += hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return {max, float(sum), __builtin_log(sum), plain / classes, shift};
}

// The loss of a row, computed in double from differences: max + log_sum would round at large logits.
GPT2FAST_INLINE float loss_of(const Row& row, float at_target, float smoothing, float z_loss) {
  double loss = (double(row.max) - at_target) + row.log_sum;
  if (smoothing != 0)
    loss = (1.0 - smoothing) * loss + smoothing * ((row.max - row.shift) + row.log_sum - row.mean);
  const double lse = row.max + row.log_sum;
  if (z_loss != 0) loss += z_loss * lse * lse;
  return float(loss);
}

// u times the derivative by the logits; `out` may be `z`.
template <class T>
static void write_row(const T* z, T* out, i64 columns, i64 classes, i64 target, float max, float sum, float u,
                      float smoothing, float z_loss) {
  const float lse = max + __builtin_logf(sum), at_target = get(z + target);
  const float penalty = 2.0f * z_loss * lse;  // d(zl lse^2) / d lse
  const float scale = u * (1.0f + penalty) / sum, uniform = smoothing / classes, rest = u * uniform;
  i64 c = 0;
  for (; c + VL <= classes; c += VL)
    store(out + c, exp_nonpositive<true>(load(z + c) - max) * scale - rest);
  if (c < classes)
    store_n(out + c, exp_nonpositive<true>(load_n(z + c, classes - c) - max) * scale - rest, classes - c);
  for (c = classes; c < columns; c += VL) store_at(out + c, vf{}, columns - c < VL ? columns - c : i64(VL));
  // p_t - 1 in fp32, before u and before rounding to T.
  const float p = exp_nonpositive<true>(splat(at_target - max))[0] / sum;
  put(out + target, u * ((p - 1.0f) + (smoothing - uniform) + p * penalty));
}

template <class T>
static void zero_row(T* out, i64 columns) {
  for_columns(columns, [&](i64 c, i64 n) { store_at(out + c, vf{}, n); });
}

GPT2FAST_INLINE i64 row_grain(i64 columns) { return (SHARE_ELEMENTS + columns - 1) / columns; }

// ---- the kernels ------------------------------------------------------------------------------------

// The number of rows that are not ignored, or -1 - r where targets[r] is the first that is no class.
// The kernels below rely on it having been called.
int64_t cross_entropy_count(uintptr_t targets, int64_t rows, int64_t classes, int64_t ignore_index) {
  const i64* target = (const i64*)targets;
  i64 count = 0;
  for (i64 r = 0; r < rows; ++r) {
    if (target[r] == ignore_index) continue;
    if (target[r] < 0 || target[r] >= classes) return -1 - r;
    ++count;
  }
  return count;
}

// logprobs may be 0. Ignored rows are not read: loss 0, logprob 0, m 0, s 1. With `overwrite` the gradient for
// an upstream of one goes where the logits were.
void cross_entropy_forward(uintptr_t logits, i64 stride, uintptr_t targets, uintptr_t loss, uintptr_t logprobs,
                           uintptr_t statistics, bool overwrite, float factor, i64 rows, i64 columns,
                           i64 classes, i64 ignore_index, float smoothing, float z_loss, int dtype,
                           int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_shares(rows, row_grain(columns), threads, [&](int, i64 begin, i64 end) {
      for (i64 r = begin; r < end; ++r) {
        const i64 target = ((const i64*)targets)[r];
        T* z = (T*)logits + r * stride;
        Row row = {0.0f, 1.0f, 0.0, 0.0, 0.0};
        float row_loss = 0.0f, logprob = 0.0f;
        if (target != ignore_index) {
          row = smoothing != 0 ? read_row<true>(z, classes, target) : read_row<false>(z, classes, target);
          const float at_target = get(z + target);
          row_loss = loss_of(row, at_target, smoothing, z_loss);
          logprob = float((double(at_target) - row.max) - row.log_sum);
          if (overwrite)
            write_row(z, z, columns, classes, target, row.max, row.sum, factor, smoothing, z_loss);
        } else if (overwrite) {
          zero_row(z, columns);
        }
        ((float*)loss)[r] = row_loss;
        if (logprobs) ((float*)logprobs)[r] = logprob;
        ((float*)statistics)[2 * r] = row.max;
        ((float*)statistics)[2 * r + 1] = row.sum;
      }
    });
  });
}

// u of row r is upstream[r * upstream_stride] * factor; dlogits may be the logits.
void cross_entropy_backward(uintptr_t upstream, i64 upstream_stride, float factor, uintptr_t logits, i64 stride,
                            uintptr_t targets, uintptr_t statistics, uintptr_t dlogits, i64 dlogits_stride,
                            i64 rows, i64 columns, i64 classes, i64 ignore_index, float smoothing, float z_loss,
                            int dtype, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_shares(rows, row_grain(columns), threads, [&](int, i64 begin, i64 end) {
      for (i64 r = begin; r < end; ++r) {
        const i64 target = ((const i64*)targets)[r];
        T* out = (T*)dlogits + r * dlogits_stride;
        if (target == ignore_index) {
          zero_row(out, columns);
          continue;
        }
        const float *saved = (const float*)statistics + 2 * r, u = ((const float*)upstream)[r * upstream_stride];
        write_row((const T*)logits + r * stride, out, columns, classes, target, saved[0], saved[1], u * factor,
                  smoothing, z_loss);
      }
    });
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Layer norm, and residual add + layer norm in one pass.
//
//   forward   s = M x + residual (or x),  y = (s - mean) * rstd * w + b,  rstd = 1 / sqrt(var + eps)
//             M = dropout's mask / (1 - dropout), or 1
//   backward  x^ = (s - mean) * rstd,  g = dy * w
//             ds = rstd * (g - mean(g) - x^ * mean(g * x^)) [+ dsum];  dresidual = ds, dx = M ds
//             dw = sum over rows of dy * x^,  db = sum over rows of dy
//   source    Ba et al. 2016, "Layer Normalization"; the backward is its derivative.
//   layout    rows of `columns` contiguous elements, any row stride for inputs; outputs contiguous.
//   moves     forward 2 (x, y) or 4 (x, residual, s, y) elements per entry; backward 3 (dy, s, ds) or 4.
//   work      rows are shared out among threads; a row (3 KB at width 768) stays in L1 for its two passes.
//             dw and db: fp32 partials per thread, flushed every FLUSH rows, added in thread order.
//   saves     s (the input where there is no residual), mean and rstd in fp32. The mask is a hash, formed again.
#include "common/random.h"
#include "common/simd.h"

#include "layer_norm/layer_norm_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 ELEMENT_GRAIN = 6144;  // elements below which a second thread costs more than it brings
GPT2FAST_INLINE i64 row_grain(i64 columns) { return (ELEMENT_GRAIN + columns - 1) / columns; }

// What x is once it is stored, and stores it.
GPT2FAST_INLINE vf stored(float* p, vf x, i64 n) {
  store_at(p, x, n);
  return x;
}
template <class T>
GPT2FAST_INLINE vf stored(T* p, vf x, i64 n) {
  store_at(p, x, n);
  return load_at(p, n);
}

template <class T>
static void forward_rows(const T* x, i64 x_stride, const T* residual, i64 residual_stride, const float* w,
                         const float* b, T* sum, T* y, float* mean, float* rstd, i64 begin, i64 end,
                         i64 columns, float eps, const Dropout* dropout) {
  const i64 some = columns < VL ? columns : columns / VL > 4 ? 4 * VL : columns / VL * VL;
  for (i64 r = begin; r < end; ++r) {
    const T* row = x + r * x_stride;
    const T* other = residual ? residual + r * residual_stride : nullptr;
    T* total = residual ? sum + r * columns : nullptr;
    if (dropout) {
      const RandomRow mask(*dropout, r);
      for_columns(columns, [&](i64 c, i64 n) {
        const vf kept = select(mask.keep(c), load_at(row + c, n) * dropout->keep, vf{});
        store_at(total + c, kept + load_at(other + c, n), n);
      });
      row = total;
    }
    const bool adds = residual && !dropout;
    // Deviations from a number near the mean: E[x^2] - E[x]^2 would cancel at large means, and the mean itself is rounded.
    vf few = {};
    for_columns(some, [&](i64 c, i64 n) {
      few += load_at(row + c, n);
      if (adds) few += load_at(other + c, n);
    });
    float mu = hsum(few) / some, rest = 0.0f, variance = 0.0f;
    vf sums[4] = {}, squares[4] = {};
    const auto add = [&](int k, vf d, i64 n) {
      if (n < VL)
        for (i64 i = n; i < VL; ++i) d[i] = 0.0f;
      sums[k] += d;
      squares[k] += d * d;
    };
    if (adds)  // the norm is of the rounded sum
      for_columns_in_turn(columns, [&](int k, i64 c, i64 n) {
        add(k, stored(total + c, load_at(row + c, n) + load_at(other + c, n), n) - mu, n);
      });
    else
      for_columns_in_turn(columns, [&](int k, i64 c, i64 n) { add(k, load_at(row + c, n) - mu, n); });
    if (residual) row = total;
    // Where the number was not near the mean against the deviation, the pass is taken again from a better one.
    for (int pass = 0;; ++pass) {
      const float missed = hsum(sums) / columns;
      variance = hsum(squares) / columns - missed * missed;
      rest += missed;
      if (missed * missed <= 0.25f * variance || pass == 2) break;
      for (int k = 0; k < 4; ++k) sums[k] = squares[k] = vf{};
      for_columns_in_turn(columns, [&](int k, i64 c, i64 n) { add(k, load_at(row + c, n) - mu - rest, n); });
    }
    const float scale = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);  // NaN stays NaN
    T* out = y + r * columns;
    for_columns(columns, [&](i64 c, i64 n) {
      vf value = (load_at(row + c, n) - mu - rest) * scale;
      if (w) value *= load_at(w + c, n);
      if (b) value += load_at(b + c, n);
      store_at(out + c, value, n);
    });
    mean[r] = mu + rest;
    rstd[r] = scale;
  }
}

void layer_norm_forward(uintptr_t x, i64 x_stride, uintptr_t residual, i64 residual_stride, uintptr_t weight,
                        uintptr_t bias, uintptr_t sum, uintptr_t y, uintptr_t mean, uintptr_t rstd, i64 rows,
                        i64 columns, float eps, double dropout, i64 seed, int dtype, int threads) {
  const Dropout mask = head_dropout(dropout, seed, 0, 0);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_shares(rows, row_grain(columns), threads, [&](int, i64 begin, i64 end) {
      forward_rows((const T*)x, x_stride, (const T*)residual, residual_stride, (const float*)weight,
                   (const float*)bias, (T*)sum, (T*)y, (float*)mean, (float*)rstd, begin, end, columns, eps,
                   dropout > 0.0 ? &mask : nullptr);
    });
  });
}

// dw and db of the rows [begin, end) go to partial[0..columns) and partial[columns..2*columns).
template <class T, bool INPUT, bool PARAMETERS>
static void backward_rows(const T* dy, i64 dy_stride, const T* dsum, i64 dsum_stride, const T* x, i64 x_stride,
                          const float* w, const float* mean, const float* rstd, T* dx, float* partial,
                          float* recent, i64 begin, i64 end, i64 columns) {
  const auto flush = [&] {
    for_columns(2 * columns, [&](i64 c, i64 n) {
      store_at(partial + c, load_at(partial + c, n) + load_at(recent + c, n), n);
      store_at(recent + c, vf{}, n);
    });
  };
  if (PARAMETERS)
    for (i64 c = 0; c < 2 * columns; ++c) partial[c] = recent[c] = 0.0f;
  for (i64 r = begin; r < end; ++r) {
    const T* grad = dy + r * dy_stride;
    const T* row = x + r * x_stride;
    const float mu = mean[r], scale = rstd[r];
    vf sum_g[4] = {}, sum_gx[4] = {};
    for_columns_in_turn(columns, [&](int k, i64 c, i64 n) {
      const vf d = load_at(grad + c, n), hat = (load_at(row + c, n, mu) - mu) * scale;
      if (INPUT) {
        const vf g = w ? d * load_at(w + c, n) : d;
        sum_g[k] += g;
        sum_gx[k] += g * hat;
      }
      if (PARAMETERS) {
        store_at(recent + c, load_at(recent + c, n) + d * hat, n);
        store_at(recent + columns + c, load_at(recent + columns + c, n) + d, n);
      }
    });
    if (INPUT) {
      const float mean_g = hsum(sum_g) / columns, mean_gx = hsum(sum_gx) / columns;
      T* out = dx + r * columns;
      for_columns(columns, [&](i64 c, i64 n) {
        const vf d = load_at(grad + c, n), hat = (load_at(row + c, n) - mu) * scale;
        const vf g = w ? d * load_at(w + c, n) : d;
        vf value = (g - mean_g - hat * mean_gx) * scale;
        if (dsum) value += load_at(dsum + r * dsum_stride + c, n);
        store_at(out + c, value, n);
      });
    }
    if (PARAMETERS && (r - begin) % FLUSH == FLUSH - 1) flush();
  }
  if (PARAMETERS) flush();
}

// workspace: threads * 4 * columns floats where dweight and dbias are wanted; dx, dweight/dbias may be 0.
void layer_norm_backward(uintptr_t dy, i64 dy_stride, uintptr_t dsum, i64 dsum_stride, uintptr_t x, i64 x_stride,
                         uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dweight,
                         uintptr_t dbias, uintptr_t workspace, i64 rows, i64 columns, int dtype, int threads) {
  if (!dx && !workspace) return;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool parameters = workspace != 0;
    parallel_shares(rows, row_grain(columns), threads, [&](int share, i64 begin, i64 end) {
      float* partial = (float*)workspace + share * 4 * columns;
      const auto run = parameters ? (dx ? backward_rows<T, true, true> : backward_rows<T, false, true>)
                                  : backward_rows<T, true, false>;
      run((const T*)dy, dy_stride, (const T*)dsum, dsum_stride, (const T*)x, x_stride, (const float*)weight,
          (const float*)mean, (const float*)rstd, (T*)dx, partial, partial + 2 * columns, begin, end, columns);
    });
  });
  if (!workspace) return;
  const int used = share_count(rows, row_grain(columns), threads);
  const float* partials = (const float*)workspace;
  float *dw = (float*)dweight, *db = (float*)dbias;
  for_columns(columns, [&](i64 c, i64 n) {
    vf sum_w = {}, sum_b = {};
    for (int t = 0; t < used; ++t) {
      sum_w += load_at(partials + t * 4 * columns + c, n);
      sum_b += load_at(partials + t * 4 * columns + columns + c, n);
    }
    if (dw) store_at(dw + c, sum_w, n);
    if (db) store_at(db + c, sum_b, n);
  });
}

// dx = M ds for contiguous ds: what dropout lets through.
void dropout_rows(uintptr_t ds, uintptr_t dx, i64 rows, i64 columns, double dropout, i64 seed, int dtype,
                  int threads) {
  const Dropout mask = head_dropout(dropout, seed, 0, 0);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_shares(rows, row_grain(columns), threads, [&](int, i64 begin, i64 end) {
      for (i64 r = begin; r < end; ++r) {
        const RandomRow row(mask, r);
        const T* from = (const T*)ds + r * columns;
        T* to = (T*)dx + r * columns;
        for_columns(columns, [&](i64 c, i64 n) {
          store_at(to + c, select(row.keep(c), load_at(from + c, n) * mask.keep, vf{}), n);
        });
      }
    });
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

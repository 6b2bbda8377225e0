// Tanh-GELU of x + bias, its backward with the bias gradient, and the recomputed activation beside it.
//
//   forward   z = x + bias,  y = z s,  s = sigmoid(q),  q = 2 sqrt(2/pi) (z + 0.044715 z^3)
//   backward  dx = dy (s + z s (1 - s) q'),  q' = 2 sqrt(2/pi) (1 + 3 * 0.044715 z^2)
//             dbias = sum over rows of dx
//   source    Hendrycks & Gimpel 2016, "Gaussian Error Linear Units"; 0.5 (1 + tanh(q/2)) = sigmoid(q), which
//             costs one exponential and one division and does not cancel for negative z.
//   layout    rows of `columns` contiguous elements, any row stride for inputs; outputs contiguous.
//   moves     forward 2 elements per entry (x, y); backward 3 (dy, x, dx), or 4 with the activation.
//             dx may be dy itself: in-place work saves the line fills of a fresh output.
//   work      rows are shared out among threads; contiguous x without bias is one long row of elements.
//             dbias: four rows are summed in registers, added to a row of fp32 partials per thread, which is
//             flushed every FLUSH rows; threads are added in their order.
//   saves     x, without the bias.
#include "common/simd.h"
#include "gelu/gelu_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 ELEMENT_GRAIN = 4096;  // elements below which a second thread costs more than it brings
constexpr i64 ROW_BLOCK = 4;
static_assert(FLUSH % ROW_BLOCK == 0, "a flush falls on a row block's end");

// e = exp(-q(z)) and s = 1 / (1 + e) for |z| <= 10, where e stays within 2^-126 .. 2^126.
struct Sigmoid {
  vf s, e;
};
GPT2FAST_INLINE Sigmoid sigmoid_of(vf z) {
  // log2(e) is folded into the coefficients: 2^w, w = n + r, |r| <= 1/2, a degree-6 minimax polynomial in r
  // with relative error 2e-9.
  const vf w = z * (z * z * -0.10294323957f - 2.3022082f);
  const vf shifted = w + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const vf r = w - (shifted - 12582912.0f);
  vf p = splat(0.00015353361959569156f);
  p = p * r + 0.0013398875016719103f;
  p = p * r + 0.00961843691766262f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  const vf power = as_float((vu)(((vi)as_bits(shifted) - (0x4b400000 - 127)) << 23));
  const vf e = p * power;
  return {1.0f / (1.0f + e), e};
}

// Beyond |z| = 10, s is 0 or 1 in fp32 and z s (1 - s) q' is 0: clamping there keeps all factors finite.
GPT2FAST_INLINE vf gelu(vf z) {
  const vf low = vmax(splat(-10.0f), z);  // this order keeps a NaN in z
  return low * sigmoid_of(vmin(splat(10.0f), low)).s;
}
struct Gelu {
  vf value, slope;
};
GPT2FAST_INLINE Gelu gelu_with_slope(vf z) {
  const vf low = vmax(splat(-10.0f), z), c = vmin(splat(10.0f), low);
  const Sigmoid g = sigmoid_of(c);
  const vf dq = c * c * 0.21406444881f + 1.59576912161f;
  return {low * g.s, g.s + (c * dq) * (g.e * g.s) * g.s};
}

template <class T>
static void forward_rows(const T* x, i64 x_stride, const float* bias, T* y, i64 begin, i64 end, i64 columns) {
  for (i64 r = begin; r < end; ++r) {
    const T* row = x + r * x_stride;
    T* out = y + r * columns;
    for_columns(columns, [&](i64 c, i64 n) {
      vf z = load_at(row + c, n);
      if (bias) z += load_at(bias + c, n);
      store_at(out + c, gelu(z), n);
    });
  }
}

GPT2FAST_INLINE i64 row_grain(i64 columns) { return (ELEMENT_GRAIN + columns - 1) / columns; }

void gelu_forward(uintptr_t x, i64 x_stride, uintptr_t bias, uintptr_t y, i64 rows, i64 columns, int dtype,
                  int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (!bias && (x_stride == columns || rows <= 1)) {
      parallel_shares(rows * columns, ELEMENT_GRAIN, threads, [&](int, i64 begin, i64 end) {
        forward_rows<T>((const T*)x + begin, 0, nullptr, (T*)y + begin, 0, 1, end - begin);
      });
      return;
    }
    parallel_shares(rows, row_grain(columns), threads, [&](int, i64 begin, i64 end) {
      forward_rows((const T*)x, x_stride, (const float*)bias, (T*)y, begin, end, columns);
    });
  });
}

// ROWS rows at once from row r: dx, the activation, and the sum of dx into recent[0..columns). What is absent
// is a test a vector, always the same way; as template parameters they took a minute of compiler time.
template <class T, int ROWS>
GPT2FAST_INLINE void backward_block(const T* dy, i64 dy_stride, const T* x, i64 x_stride, const float* bias, T* dx,
                                    T* activation, float* recent, i64 r, i64 columns) {
  for_columns(columns, [&](i64 c, i64 n) {
    const vf b = bias ? load_at(bias + c, n) : vf{};
    vf sum = {};
    for (int i = 0; i < ROWS; ++i) {
      const Gelu g = gelu_with_slope(load_at(x + (r + i) * x_stride + c, n) + b);
      if (activation) store_at(activation + (r + i) * columns + c, g.value, n);
      const vf d = load_at(dy + (r + i) * dy_stride + c, n) * g.slope;
      if (dx) store_at(dx + (r + i) * columns + c, d, n);
      sum += d;
    }
    if (recent) store_at(recent + c, load_at(recent + c, n) + sum, n);
  });
}

// dbias of the rows [begin, end) goes to partial[0..columns), where it is wanted (partial is not null).
template <class T>
static void backward_rows(const T* dy, i64 dy_stride, const T* x, i64 x_stride, const float* bias, T* dx,
                          T* activation, float* partial, float* recent, i64 begin, i64 end, i64 columns) {
  const auto flush = [&] {
    for_columns(columns, [&](i64 c, i64 n) {
      store_at(partial + c, load_at(partial + c, n) + load_at(recent + c, n), n);
      store_at(recent + c, vf{}, n);
    });
  };
  if (partial)
    for (i64 c = 0; c < columns; ++c) partial[c] = recent[c] = 0.0f;
  i64 r = begin;
  for (; r + ROW_BLOCK <= end; r += ROW_BLOCK) {
    backward_block<T, ROW_BLOCK>(dy, dy_stride, x, x_stride, bias, dx, activation, recent, r, columns);
    if (partial && (r + ROW_BLOCK - begin) % FLUSH == 0) flush();
  }
  for (; r < end; ++r)
    backward_block<T, 1>(dy, dy_stride, x, x_stride, bias, dx, activation, recent, r, columns);
  if (partial) flush();
}

// workspace: threads * 2 * columns floats where dbias is wanted; bias, dx, activation and dbias may be 0.
void gelu_backward(uintptr_t dy, i64 dy_stride, uintptr_t x, i64 x_stride, uintptr_t bias, uintptr_t dx,
                   uintptr_t activation, uintptr_t dbias, uintptr_t workspace, i64 rows, i64 columns, int dtype,
                   int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (!bias && !activation && !dbias && (rows <= 1 || (x_stride == columns && dy_stride == columns))) {
      parallel_shares(rows * columns, ELEMENT_GRAIN, threads, [&](int, i64 begin, i64 end) {
        backward_rows<T>((const T*)dy + begin, 0, (const T*)x + begin, 0, nullptr, (T*)dx + begin, nullptr, nullptr,
                         nullptr, 0, 1, end - begin);
      });
      return;
    }
    parallel_shares(rows, row_grain(columns), threads, [&](int share, i64 begin, i64 end) {
      float* partial = dbias ? (float*)workspace + share * 2 * columns : nullptr;
      float* recent = dbias ? partial + columns : nullptr;
      backward_rows((const T*)dy, dy_stride, (const T*)x, x_stride, (const float*)bias, (T*)dx, (T*)activation, partial,
                    recent, begin, end, columns);
    });
  });
  if (!dbias) return;
  const int used = share_count(rows, row_grain(columns), threads);
  for_columns(columns, [&](i64 c, i64 n) {
    vf sum = {};
    for (int t = 0; t < used; ++t) sum += load_at((const float*)workspace + t * 2 * columns + c, n);
    store_at((float*)dbias + c, sum, n);
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Tanh-GELU of z = x + bias.
//
//   forward   y = z s,  s = sigmoid(2 u),  u = sqrt(2/pi) (z + 0.044715 z^3)
//   backward  dx = dy (s + z s (1 - s) d(2 u)/dz),  dbias = sum over rows of dx in fp32
//   source    Hendrycks & Gimpel 2016, arXiv:1606.08415, in GPT-2's tanh form: 0.5 (1 + tanh u) = s, which
//             keeps its relative accuracy where tanh u is near -1.
//   layout    rows of contiguous columns at any row stride; outputs contiguous.
//   moves     forward reads x and writes y once; backward reads dy and x and writes dx (and the activation)
//             once, besides a line of C partial sums for each strip of rows.
//   work      a thread has 16 bytes of columns and walks down the rows of its strip, two rows at a time, so
//             that the bias is read once and dbias stays in registers. A second kernel adds the strips' sums
//             in a fixed order.
//   saves     nothing: x is kept, and the activation is computed again.
#include "gelu/gelu_cuda.h"

#include "common/cuda.h"
#include "common/gelu.h"
#include "common/parameter.h"
#include "common/partial_sums.h"

namespace gpt2fast {
namespace cuda {

constexpr int GELU_THREADS = 128, GELU_ROWS = 2;  // rows at a time

template <class T, int V>
__global__ void __launch_bounds__(GELU_THREADS)
    gelu_forward_kernel(const T* x, i64 x_stride, Parameter bias, T* y, i64 rows, i64 columns) {
  const i64 c = (i64(blockIdx.y) * GELU_THREADS + threadIdx.x) * V;
  if (c >= columns) return;
  float b[V];
  load_parameter<T>(bias, c, 0.0f, b);
  for (i64 row = i64(blockIdx.x) * GELU_ROWS; row < rows; row += i64(gridDim.x) * GELU_ROWS) {
    Vector<T, V> in[GELU_ROWS];
#pragma unroll
    for (int i = 0; i < GELU_ROWS; ++i)
      if (row + i < rows) in[i] = load_vector<true, Vector<T, V>>(x + (row + i) * x_stride + c);
#pragma unroll
    for (int i = 0; i < GELU_ROWS; ++i) {
      if (row + i >= rows) continue;
      Vector<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float slope;
        out.at[j] = from_float<T>(gelu_and_slope(to_float(in[i].at[j]) + b[j], slope));
      }
      store_vector(y + (row + i) * columns + c, out);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(GELU_THREADS)
    gelu_backward_kernel(const T* dy, i64 dy_stride, const T* x, i64 x_stride, Parameter bias, T* dx, T* activation,
                         float* partials, i64 rows, i64 columns) {
  const i64 c = (i64(blockIdx.y) * GELU_THREADS + threadIdx.x) * V;
  if (c >= columns) return;
  float b[V], sum[V];
  load_parameter<T>(bias, c, 0.0f, b);
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = 0;
  for (i64 row = i64(blockIdx.x) * GELU_ROWS; row < rows; row += i64(gridDim.x) * GELU_ROWS) {
    Vector<T, V> g[GELU_ROWS], in[GELU_ROWS];
#pragma unroll
    for (int i = 0; i < GELU_ROWS; ++i) {
      if (row + i >= rows) continue;
      g[i] = load_vector<true, Vector<T, V>>(dy + (row + i) * dy_stride + c);
      in[i] = load_vector<true, Vector<T, V>>(x + (row + i) * x_stride + c);
    }
#pragma unroll
    for (int i = 0; i < GELU_ROWS; ++i) {
      if (row + i >= rows) continue;
      Vector<T, V> out, value;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float slope;
        value.at[j] = from_float<T>(gelu_and_slope(to_float(in[i].at[j]) + b[j], slope));
        const float d = to_float(g[i].at[j]) * slope;
        out.at[j] = from_float<T>(d);
        sum[j] += d;
      }
      if (dx) store_vector(dx + (row + i) * columns + c, out);
      if (activation) store_vector(activation + (row + i) * columns + c, value);
    }
  }
  if (!partials) return;
#pragma unroll
  for (int j = 0; j < V; ++j) partials[i64(blockIdx.x) * columns + c + j] = sum[j];
}

template <class T, int V>
static dim3 gelu_grid(i64 strips, i64 columns) {
  return dim3(unsigned(strips), unsigned(ceil_div(columns, i64(V) * GELU_THREADS)));
}

void gelu_forward(uintptr_t x, i64 x_stride, uintptr_t bias, bool bias_wide, uintptr_t y, i64 rows, i64 columns,
                  int dtype, uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto run = [&](auto kernel, dim3 grid) {
      launch("gelu_forward", kernel, grid, GELU_THREADS, 0, stream, (const T*)x, x_stride,
             Parameter{(const void*)bias, bias_wide}, (T*)y, rows, columns);
    };
    const i64 strips = ceil_div(rows, GELU_ROWS);
    if (aligned<T>(x, x_stride) && aligned<T>(y, columns) && bias % 16 == 0)
      run(gelu_forward_kernel<T, WIDE<T>>, gelu_grid<T, WIDE<T>>(strips, columns));
    else
      run(gelu_forward_kernel<T, 1>, gelu_grid<T, 1>(strips, columns));
  });
}

void gelu_backward(uintptr_t dy, i64 dy_stride, uintptr_t x, i64 x_stride, uintptr_t bias, bool bias_wide,
                   uintptr_t dx, uintptr_t activation, uintptr_t dbias, uintptr_t partials, i64 strips, i64 rows,
                   i64 columns, int dtype, uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto run = [&](auto kernel, dim3 grid) {
      launch("gelu_backward", kernel, grid, GELU_THREADS, 0, stream, (const T*)dy, dy_stride, (const T*)x, x_stride,
             Parameter{(const void*)bias, bias_wide}, (T*)dx, (T*)activation, (float*)partials, rows, columns);
    };
    if (aligned<T>(dy, dy_stride) && aligned<T>(x, x_stride) && aligned<T>(dx, columns) &&
        aligned<T>(activation, columns) && bias % 16 == 0)
      run(gelu_backward_kernel<T, WIDE<T>>, gelu_grid<T, WIDE<T>>(strips, columns));
    else
      run(gelu_backward_kernel<T, 1>, gelu_grid<T, 1>(strips, columns));
  });
  if (partials)
    sum_partials("gelu_backward", (const float*)partials, strips, columns, (float*)dbias, nullptr, columns, stream);
}

}  // namespace cuda
}  // namespace gpt2fast

// Layer norm, and residual add + layer norm in one pass.
//
//   forward   s = M x + residual (or x),  y = (s - mean) rstd w + b,  rstd = 1 / sqrt(var + eps)
//             M = dropout's mask / (1 - dropout), or 1
//   backward  x^ = (s - mean) rstd,  g = dy w,  ds = rstd (g - mean(g) - x^ mean(g x^)) [+ dsum]
//             dw = sum over rows of dy x^,  db = sum over rows of dy
//   source    Ba et al. 2016, "Layer Normalization"; the backward is its derivative.
//   layout    rows of contiguous columns at any row stride; outputs contiguous; mean and rstd (2, R) fp32.
//   moves     forward reads x (and the residual) and writes y (and s) once; backward reads dy, s (and dsum) and
//             writes ds once, besides a line of 2 C partial sums for each block (1% at GPT-2's sizes).
//   work      a warp, 4 or 16 warps hold a whole row in registers, N 16-byte pieces a thread, all asked for
//             at once; so the variance is that of centred values. Backward: a fixed number of blocks walk over
//             the rows and keep dw and db of their columns in registers; a second kernel adds the blocks'
//             sums in a fixed order. Rows that do not fit, or do not start on 16 bytes, are read piece by
//             piece, again in each of the passes; their dw and db take a pass of their own.
//   saves     s (the input where there is no residual), mean and rstd. The mask is a hash, formed again.
#include "layer_norm/layer_norm_cuda.h"

#include "common/cuda.h"
#include "common/parameter.h"
#include "common/partial_sums.h"

namespace gpt2fast {
namespace cuda {

struct Dropout {
  const i64* seed;  // null: none
  float factor;
  int threshold;
};

// M x + residual, rounded as it is stored: what follows is the norm of that.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> add(const Vector<T, V>& x, const Vector<T, V>& residual,
                                            const Dropout& dropout, const RandomRow& mask, uint32_t column) {
  Vector<T, V> s;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float v = to_float(x.at[j]);
    if (dropout.seed) v = mask.kept(column + j, dropout.threshold) ? v * dropout.factor : 0.0f;
    s.at[j] = from_float<T>(v + to_float(residual.at[j]));
  }
  return s;
}

template <int WARPS>
constexpr int BLOCK_WARPS = WARPS < 4 ? 4 : WARPS;

// ---- rows held in registers ----------------------------------------------------------------------------

template <class T, int N, int WARPS, bool RESIDUAL>
__global__ void __launch_bounds__(BLOCK_WARPS<WARPS>* WARP)
    layer_norm_forward_kernel(const T* x, i64 x_stride, const T* residual, i64 residual_stride, Parameter weight,
                              Parameter bias, T* total, T* y, float* mean, float* rstd, i64 rows, int columns,
                              float eps, Dropout dropout) {
  constexpr int V = WIDE<T>, LANES = WARPS * WARP, GROUPS = BLOCK_WARPS<WARPS> / WARPS;
  struct Shared {
    float first[WARPS], second[WARPS], third[WARPS];
  };
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % LANES;
  const i64 row = i64(blockIdx.x) * GROUPS + threadIdx.x / LANES;
  if (row >= rows) return;  // whole groups, and only where a group is a warp

  Vector<T, V> s[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int c = (i * LANES + lane) * V;
    if (c < columns) s[i] = load_vector<true, Vector<T, V>>(x + row * x_stride + c);
  }
  if (RESIDUAL) {
    Vector<T, V> other[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = (i * LANES + lane) * V;
      if (c < columns) other[i] = load_vector<true, Vector<T, V>>(residual + row * residual_stride + c);
    }
    RandomRow mask;
    if (dropout.seed) mask = RandomRow(*dropout.seed, 0, 0, uint32_t(row));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = (i * LANES + lane) * V;
      if (c >= columns) continue;
      s[i] = add(s[i], other[i], dropout, mask, c);
      store_vector(total + row * columns + c, s[i]);
    }
  }

  // Sums over what is real; the mean of what is left corrects the rounding of a sum of large values.
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if ((i * LANES + lane) * V < columns)
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_float(s[i].at[j]);
  float center = block_sum<WARPS>(sum, shared.first) / columns;
  sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if ((i * LANES + lane) * V < columns)
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_float(s[i].at[j]) - center;
  center += block_sum<WARPS>(sum, shared.second) / columns;
  sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if ((i * LANES + lane) * V < columns)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = to_float(s[i].at[j]) - center;
        sum = fmaf(d, d, sum);
      }
  const float scale = 1 / sqrtf(block_sum<WARPS>(sum, shared.third) / columns + eps);
  if (lane == 0) {
    mean[row] = center;
    rstd[row] = scale;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int c = (i * LANES + lane) * V;
    if (c >= columns) continue;
    float w[V], b[V];
    load_parameter<T>(weight, c, 1.0f, w);
    load_parameter<T>(bias, c, 0.0f, b);
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = from_float<T>(fmaf((to_float(s[i].at[j]) - center) * scale, w[j], b[j]));
    store_vector(y + row * columns + c, out);
  }
}

// How many blocks of the backward should fit on a multiprocessor: with fewer registers they would spill.
template <class T, int N, int WARPS>
constexpr int BACKWARD_BLOCKS = WARPS == 16 ? 1 : N * WIDE<T> >= 32 ? 2 : 4;

template <class T, int N, int WARPS>
__global__ void __launch_bounds__(BLOCK_WARPS<WARPS>* WARP, BACKWARD_BLOCKS<T, N, WARPS>)
    layer_norm_backward_kernel(const T* dy, i64 dy_stride, const T* dsum, i64 dsum_stride, const T* x,
                               i64 x_stride, Parameter weight, const float* mean, const float* rstd, T* dx,
                               float* partials, i64 rows, int columns) {
  constexpr int V = WIDE<T>, LANES = WARPS * WARP, GROUPS = BLOCK_WARPS<WARPS> / WARPS;
  struct Shared {
    float rooms[2][2][WARPS];  // of a row and the next, so that one barrier a row is enough
    float sums[GROUPS == 1 ? 1 : 2 * N * LANES * V];
  };
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;

  float dw[N][V], db[N][V];
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < V; ++j) dw[i][j] = db[i][j] = 0;
  int turn = 0;
  for (i64 row = i64(blockIdx.x) * GROUPS + group; row < rows; row += i64(gridDim.x) * GROUPS, turn ^= 1) {
    Vector<T, V> g[N], s[N], add[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = (i * LANES + lane) * V;
      if (c >= columns) continue;
      g[i] = load_vector<true, Vector<T, V>>(dy + row * dy_stride + c);
      s[i] = load_vector<true, Vector<T, V>>(x + row * x_stride + c);
      if (dsum && dx) add[i] = load_vector<true, Vector<T, V>>(dsum + row * dsum_stride + c);
    }
    const float center = mean[row], scale = rstd[row];
    float level = 0, along = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = (i * LANES + lane) * V;
      if (c >= columns) continue;
      float w[V];  // from the nearest cache, twice a row: held in registers it would make them spill
      load_parameter<T>(weight, c, 1.0f, w);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = to_float(g[i].at[j]), xhat = (to_float(s[i].at[j]) - center) * scale;
        dw[i][j] = fmaf(d, xhat, dw[i][j]);
        db[i][j] += d;
        level += d * w[j];
        along = fmaf(d * w[j], xhat, along);
      }
    }
    if (!dx) continue;
    block_sums<WARPS>(level, along, shared.rooms[turn]);
    level /= columns;
    along /= columns;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = (i * LANES + lane) * V;
      if (c >= columns) continue;
      stay_packed(g[i]);
      stay_packed(s[i]);
      float w[V];
      load_parameter<T>(weight, c, 1.0f, w);
      Vector<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float xhat = (to_float(s[i].at[j]) - center) * scale;
        float d = fmaf(-xhat, along, to_float(g[i].at[j]) * w[j] - level) * scale;
        if (dsum) d += to_float(add[i].at[j]);
        out.at[j] = from_float<T>(d);
      }
      store_vector(dx + row * columns + c, out);
    }
  }
  if (!partials) return;
  float* mine = partials + i64(blockIdx.x) * 2 * columns;
  if constexpr (GROUPS == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = (i * LANES + lane) * V;
      if (c >= columns) continue;
#pragma unroll
      for (int j = 0; j < V; j += 4) {
        store_vector(mine + c + j, Vector<float, 4>{dw[i][j], dw[i][j + 1], dw[i][j + 2], dw[i][j + 3]});
        store_vector(mine + columns + c + j, Vector<float, 4>{db[i][j], db[i][j + 1], db[i][j + 2], db[i][j + 3]});
      }
    }
  } else {
    for (int turn = 0; turn < GROUPS; ++turn) {  // the groups add up in their order
      if (group == turn) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int c = (i * LANES + lane) * V;
          if (c >= columns) continue;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            shared.sums[c + j] = dw[i][j] + (turn ? shared.sums[c + j] : 0.0f);
            shared.sums[columns + c + j] = db[i][j] + (turn ? shared.sums[columns + c + j] : 0.0f);
          }
        }
      }
      __syncthreads();
    }
    for (int c = threadIdx.x; c < 2 * columns; c += BLOCK_WARPS<WARPS> * WARP) mine[c] = shared.sums[c];
  }
}

// ---- rows of any width and alignment -------------------------------------------------------------------

constexpr int STREAM_WARPS = 8, STREAM_THREADS = STREAM_WARPS * WARP;

template <class T, int V>
__global__ void __launch_bounds__(STREAM_THREADS)
    layer_norm_forward_stream_kernel(const T* x, i64 x_stride, const T* residual, i64 residual_stride,
                                     Parameter weight, Parameter bias, T* total, T* y, float* mean, float* rstd,
                                     i64 columns, float eps, Dropout dropout) {
  struct Shared {
    float rooms[3][STREAM_WARPS];
  };
  Shared& shared = shared_memory<Shared>();
  const i64 row = blockIdx.x;
  const T* s = x + row * x_stride;
  float sum = 0;
  RandomRow mask;
  if (dropout.seed) mask = RandomRow(*dropout.seed, 0, 0, uint32_t(row));
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    auto v = load_vector<false, Vector<T, V>>(s + c);
    if (residual) {
      v = add(v, load_vector<true, Vector<T, V>>(residual + row * residual_stride + c), dropout, mask, uint32_t(c));
      store_vector(total + row * columns + c, v);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += to_float(v.at[j]);
  }
  if (residual) s = total + row * columns;  // each thread reads what it wrote itself
  float center = block_sum<STREAM_WARPS>(sum, shared.rooms[0]) / columns;
  sum = 0;
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    const auto v = load_vector<false, Vector<T, V>>(s + c);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += to_float(v.at[j]) - center;
  }
  center += block_sum<STREAM_WARPS>(sum, shared.rooms[1]) / columns;
  sum = 0;
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    const auto v = load_vector<false, Vector<T, V>>(s + c);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = to_float(v.at[j]) - center;
      sum = fmaf(d, d, sum);
    }
  }
  const float scale = 1 / sqrtf(block_sum<STREAM_WARPS>(sum, shared.rooms[2]) / columns + eps);
  if (threadIdx.x == 0) {
    mean[row] = center;
    rstd[row] = scale;
  }
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    const auto v = load_vector<false, Vector<T, V>>(s + c);
    float w[V], b[V];
    load_parameter<T>(weight, c, 1.0f, w);
    load_parameter<T>(bias, c, 0.0f, b);
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = from_float<T>(fmaf((to_float(v.at[j]) - center) * scale, w[j], b[j]));
    store_vector(y + row * columns + c, out);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(STREAM_THREADS)
    layer_norm_backward_stream_kernel(const T* dy, i64 dy_stride, const T* dsum, i64 dsum_stride, const T* x,
                                      i64 x_stride, Parameter weight, const float* mean, const float* rstd, T* dx,
                                      i64 columns) {
  struct Shared {
    float rooms[2][STREAM_WARPS];
  };
  Shared& shared = shared_memory<Shared>();
  const i64 row = blockIdx.x;
  const float center = mean[row], scale = rstd[row];
  float level = 0, along = 0;
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    const auto g = load_vector<false, Vector<T, V>>(dy + row * dy_stride + c);
    const auto s = load_vector<false, Vector<T, V>>(x + row * x_stride + c);
    float w[V];
    load_parameter<T>(weight, c, 1.0f, w);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = to_float(g.at[j]) * w[j];
      level += d;
      along = fmaf(d, (to_float(s.at[j]) - center) * scale, along);
    }
  }
  level = block_sum<STREAM_WARPS>(level, shared.rooms[0]) / columns;
  along = block_sum<STREAM_WARPS>(along, shared.rooms[1]) / columns;
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    const auto g = load_vector<false, Vector<T, V>>(dy + row * dy_stride + c);
    const auto s = load_vector<false, Vector<T, V>>(x + row * x_stride + c);
    Vector<T, V> add, out;
    if (dsum) add = load_vector<true, Vector<T, V>>(dsum + row * dsum_stride + c);
    float w[V];
    load_parameter<T>(weight, c, 1.0f, w);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float xhat = (to_float(s.at[j]) - center) * scale;
      float d = fmaf(-xhat, along, to_float(g.at[j]) * w[j] - level) * scale;
      if (dsum) d += to_float(add.at[j]);
      out.at[j] = from_float<T>(d);
    }
    store_vector(dx + row * columns + c, out);
  }
}

// dw and db of 32 columns and a strip of rows: a warp has a row at a time.
template <class T>
__global__ void __launch_bounds__(STREAM_THREADS)
    layer_norm_parameters_kernel(const T* dy, i64 dy_stride, const T* x, i64 x_stride, const float* mean,
                                 const float* rstd, float* partials, i64 rows, i64 columns) {
  struct Shared {
    float dw[STREAM_WARPS][WARP], db[STREAM_WARPS][WARP];
  };
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const i64 c = i64(blockIdx.x) * WARP + lane;
  float dw = 0, db = 0;
  if (c < columns) {
#pragma unroll 4
    for (i64 row = i64(blockIdx.y) * STREAM_WARPS + warp; row < rows; row += i64(gridDim.y) * STREAM_WARPS) {
      const float g = to_float(dy[row * dy_stride + c]);
      dw += g * ((to_float(x[row * x_stride + c]) - mean[row]) * rstd[row]);
      db += g;
    }
  }
  shared.dw[warp][lane] = dw;
  shared.db[warp][lane] = db;
  __syncthreads();
  if (warp != 0 || c >= columns) return;
  for (int i = 1; i < STREAM_WARPS; ++i) {
    dw += shared.dw[i][lane];
    db += shared.db[i][lane];
  }
  partials[(2 * i64(blockIdx.y)) * columns + c] = dw;
  partials[(2 * i64(blockIdx.y) + 1) * columns + c] = db;
}

template <class T, int V>
__global__ void __launch_bounds__(STREAM_THREADS)
    dropout_rows_kernel(const T* x, i64 x_stride, T* out, i64 columns, Dropout dropout) {
  const i64 row = blockIdx.x;
  const RandomRow mask(*dropout.seed, 0, 0, uint32_t(row));
  for (i64 c = i64(threadIdx.x) * V; c < columns; c += STREAM_THREADS * V) {
    auto v = load_vector<true, Vector<T, V>>(x + row * x_stride + c);
#pragma unroll
    for (int j = 0; j < V; ++j)
      v.at[j] = from_float<T>(mask.kept(uint32_t(c + j), dropout.threshold) ? to_float(v.at[j]) * dropout.factor
                                                                            : 0.0f);
    store_vector(out + row * columns + c, v);
  }
}

// ---- choosing -----------------------------------------------------------------------------------------

template <int N_, int WARPS_>
struct Hold {
  static constexpr int N = N_, WARPS = WARPS_;
};

// body(Hold<N, WARPS>()) for the least that holds a row of so many 16-byte pieces; false where nothing does.
template <class Body>
static bool hold_forward(i64 pieces, const Body& body) {
  if (pieces <= 1 * WARP) return body(Hold<1, 1>()), true;
  if (pieces <= 3 * WARP) return body(Hold<3, 1>()), true;
  if (pieces <= 4 * WARP) return body(Hold<4, 1>()), true;
  if (pieces <= 6 * WARP) return body(Hold<6, 1>()), true;
  if (pieces <= 8 * WARP) return body(Hold<8, 1>()), true;
  if (pieces <= 16 * WARP) return body(Hold<4, 4>()), true;
  if (pieces <= 64 * WARP) return body(Hold<4, 16>()), true;
  return false;
}
template <class Body>
static bool hold_backward(i64 pieces, const Body& body) {
  if (pieces <= 1 * WARP) return body(Hold<1, 1>()), true;
  if (pieces <= 3 * WARP) return body(Hold<3, 1>()), true;
  if (pieces <= 4 * WARP) return body(Hold<1, 4>()), true;
  if (pieces <= 8 * WARP) return body(Hold<2, 4>()), true;
  if (pieces <= 16 * WARP) return body(Hold<4, 4>()), true;
  if (pieces <= 32 * WARP) return body(Hold<2, 16>()), true;
  return false;
}

template <class T>
static bool aligned_parameter(uintptr_t address, bool wide) {
  return wide ? aligned<float>(address, 0) : aligned<T>(address, 0);
}

void layer_norm_forward(uintptr_t x_, i64 x_stride, uintptr_t residual_, i64 residual_stride, uintptr_t weight_,
                        bool weight_wide, uintptr_t bias_, bool bias_wide, uintptr_t total_, uintptr_t y_,
                        uintptr_t statistics, uintptr_t seed, i64 rows, i64 columns, double eps, double factor,
                        int threshold, int dtype, uintptr_t stream) {
  const char* op = "layer_norm_forward";
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const T *x = (const T*)x_, *residual = (const T*)residual_;
    T *total = (T*)total_, *y = (T*)y_;
    float* mean = (float*)statistics;
    float* rstd = mean + rows;
    const Parameter weight{(const void*)weight_, weight_wide}, bias{(const void*)bias_, bias_wide};
    const Dropout dropout{(const i64*)seed, float(factor), threshold};
    const bool wide = aligned<T>(x_, x_stride) && aligned<T>(residual_, residual_stride) &&
                      aligned<T>(total_, columns) && aligned<T>(y_, columns) &&
                      aligned_parameter<T>(weight_, weight_wide) && aligned_parameter<T>(bias_, bias_wide);
    const auto held = [&](auto hold) {
      constexpr int N = decltype(hold)::N, WARPS = decltype(hold)::WARPS;
      constexpr int GROUPS = BLOCK_WARPS<WARPS> / WARPS;
      const auto kernel =
          residual ? layer_norm_forward_kernel<T, N, WARPS, true> : layer_norm_forward_kernel<T, N, WARPS, false>;
      launch(op, kernel, dim3(unsigned(ceil_div(rows, GROUPS))), BLOCK_WARPS<WARPS> * WARP,
             3 * WARPS * sizeof(float), stream, x, x_stride, residual, residual_stride, weight, bias, total, y, mean,
             rstd, rows, int(columns), float(eps), dropout);
    };
    if (wide && hold_forward(columns / WIDE<T>, held)) return;
    const auto kernel =
        wide ? layer_norm_forward_stream_kernel<T, WIDE<T>> : layer_norm_forward_stream_kernel<T, 1>;
    launch(op, kernel, dim3(unsigned(rows)), STREAM_THREADS, 3 * STREAM_WARPS * sizeof(float), stream, x, x_stride,
           residual, residual_stride, weight, bias, total, y, mean, rstd, columns, float(eps), dropout);
  });
}

void layer_norm_backward(uintptr_t dy_, i64 dy_stride, uintptr_t dsum_, i64 dsum_stride, uintptr_t x_, i64 x_stride,
                         uintptr_t weight_, bool weight_wide, uintptr_t statistics, uintptr_t dx_,
                         uintptr_t dweight, uintptr_t dbias, uintptr_t partials_, i64 blocks, i64 rows, i64 columns,
                         int dtype, uintptr_t stream) {
  const char* op = "layer_norm_backward";
  float* partials = (float*)partials_;
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const T *dy = (const T*)dy_, *dsum = (const T*)dsum_, *x = (const T*)x_;
    T* dx = (T*)dx_;
    const float* mean = (const float*)statistics;
    const float* rstd = mean + rows;
    const Parameter weight{(const void*)weight_, weight_wide};
    const bool wide = aligned<T>(dy_, dy_stride) && aligned<T>(dsum_, dsum_stride) && aligned<T>(x_, x_stride) &&
                      aligned<T>(dx_, columns) && aligned_parameter<T>(weight_, weight_wide) &&
                      aligned<float>(partials_, columns);
    const auto held = [&](auto hold) {
      constexpr int N = decltype(hold)::N, WARPS = decltype(hold)::WARPS;
      const size_t sums = BLOCK_WARPS<WARPS> == WARPS ? 0 : 2 * N * WARPS * WARP * WIDE<T>;
      launch(op, layer_norm_backward_kernel<T, N, WARPS>, dim3(unsigned(blocks)), BLOCK_WARPS<WARPS> * WARP,
             (4 * WARPS + sums) * sizeof(float), stream, dy, dy_stride, dsum, dsum_stride, x, x_stride, weight, mean,
             rstd, dx, partials, rows, int(columns));
    };
    if (wide && hold_backward(columns / WIDE<T>, held)) return;
    if (dx) {
      const auto kernel =
          wide ? layer_norm_backward_stream_kernel<T, WIDE<T>> : layer_norm_backward_stream_kernel<T, 1>;
      launch(op, kernel, dim3(unsigned(rows)), STREAM_THREADS, 2 * STREAM_WARPS * sizeof(float), stream, dy,
             dy_stride, dsum, dsum_stride, x, x_stride, weight, mean, rstd, dx, columns);
    }
    if (partials)
      launch(op, layer_norm_parameters_kernel<T>, dim3(unsigned(ceil_div(columns, WARP)), unsigned(blocks)),
             STREAM_THREADS, 2 * STREAM_THREADS * sizeof(float), stream, dy, dy_stride, x, x_stride, mean, rstd,
             partials, rows, columns);
  });
  if (partials)
    sum_partials(op, partials, blocks, 2 * columns, (float*)dweight, (float*)dbias, columns, stream);
}

void dropout_rows(uintptr_t x_, i64 x_stride, uintptr_t out_, uintptr_t seed, i64 rows, i64 columns, double factor,
                  int threshold, int dtype, uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const bool wide = aligned<T>(x_, x_stride) && aligned<T>(out_, columns);
    const auto kernel = wide ? dropout_rows_kernel<T, WIDE<T>> : dropout_rows_kernel<T, 1>;
    launch("dropout_rows", kernel, dim3(unsigned(rows)), STREAM_THREADS, 0, stream, (const T*)x_, x_stride,
           (T*)out_, columns, Dropout{(const i64*)seed, float(factor), threshold});
  });
}

}  // namespace cuda
}  // namespace gpt2fast

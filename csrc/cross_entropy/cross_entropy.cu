// Cross-entropy of rows of logits z with class t, over the first K = `classes` of `columns` columns: the loss,
// its gradient, or both in one launch.
//
//   forward   m = max z,  s = sum exp(z - m),  lse = m + log s
//             loss = (1 - e) (lse - z_t) + e (lse - mean z) + zl lse^2      e label smoothing, zl z-loss
//             logprob = z_t - lse
//   backward  dz_j = u (p_j (1 + 2 zl lse) - e / K - (1 - e) [j = t]),  p_j = exp(z_j - m) / s
//             u the upstream gradient, over the number of rows that count for the mean; columns K and above
//             get 0, and so do ignored rows, which are not read
//   source    Szegedy et al. 2016, arXiv:1512.00567; Chowdhery et al. 2022, arXiv:2204.02311; online
//             softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
//   layout    rows of contiguous columns at any stride; the gradient may take the place of the logits.
//   moves     forward 1 read of the logits, backward 1 read and 1 write. Both at once: 1 read and 1 write of
//             memory, the row being kept in shared memory (98 KB in bf16 at GPT-2's vocabulary: two rows on
//             a Hopper multiprocessor, one computing while the other loads). A row that does not fit is read a
//             second time.
//   work      a block has a row. Maximum and sum are kept by thread while the row comes in, 4 pieces of 16
//             bytes asked for at once, and meet at its end: one exponential a logit and direction, and one
//             pass over memory. Where a row does not start on 16 bytes (an odd vocabulary), up to 7 elements
//             before and after the pieces are left to single lanes.
//   saves     m and s per row. Not lse: at logits of 1e4 its rounding would be the relative error of p.
//
// Nothing waits for the GPU: the number of rows that count is a scalar on the device. A target that is neither
// a class nor ignored makes its row's loss and gradient NaN.
#include "cross_entropy/cross_entropy_cuda.h"

#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

constexpr float LOWEST = -3.402823466e38f;  // the maximum of nothing, which unlike -inf can be subtracted
constexpr int UNROLL = 4;

struct Options {
  int columns, classes;
  i64 ignore_index;
  float smoothing, z_loss;
};

template <int WARPS>
struct Rooms {
  float most[WARPS], total[WARPS], plain[WARPS];
};
// The pieces of a kept row come after the rooms of the reductions.
constexpr int ROOMS_BYTES = 3 * 32 * sizeof(float);

// How a row lies: `head` elements up to a boundary of V elements, `pieces` of V, `tail` elements.
template <class T, int V>
struct Layout {
  int head, pieces, tail;
  __device__ Layout(const T* row, int classes) {
    head = V == 1 ? 0 : int((0 - uintptr_t(row) / sizeof(T)) % V);
    head = head < classes ? head : classes;
    pieces = (classes - head) / V;
    tail = classes - head - pieces * V;
  }
  // The column of the single element that thread t has, or -1.
  __device__ int edge(int t) const {
    if (t < head) return t;
    return t >= WARP / 2 && t - WARP / 2 < tail ? head + pieces * V + t - WARP / 2 : -1;
  }
};

// The running maximum and sum of exponentials of what a thread has seen.
struct Online {
  float most = LOWEST, total = 0, plain = 0;

  // fmaxf passes a NaN by; it comes back through the exponential.
  template <class T, int V, int N>
  __device__ __forceinline__ void absorb(const Vector<T, V> (&x)[N], bool with_plain, float shift) {
    float grown = most;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) grown = fmaxf(grown, to_float(x[i].at[j]));
    total *= exp_fast(most - grown);
    most = grown;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) total += exp_fast(to_float(x[i].at[j]) - most);
    if (with_plain) {
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < V; ++j) plain += to_float(x[i].at[j]) - shift;
    }
  }
};

struct Factors {
  float most, scale, rest, hit;  // dz = exp(z - most) * scale - rest, but `hit` at the target
};

__device__ __forceinline__ Factors factors(float u, float at_target, float most, float total, const Options& o) {
  const float share = o.smoothing / o.classes, top = exp_fast(at_target - most);
  Factors f{most, u / total, u * share, (top - total) / total + (o.smoothing - share)};  // p - 1 before rounding
  if (o.z_loss != 0) {
    const float penalty = 2 * o.z_loss * (most + logf(total));
    f.scale *= 1 + penalty;
    f.hit += top / total * penalty;
  }
  f.hit *= u;
  return f;
}

// The gradient of a row into `out`, which may be `z`. KEPT: its pieces are in shared memory.
template <class T, int V, int THREADS, bool KEPT>
__device__ __forceinline__ void write_row(const T* z, const Vector<T, V>* kept, T* out, i64 target,
                                          const Layout<T, V>& layout, const Factors& f, const Options& o) {
  const int t = threadIdx.x, edge = layout.edge(t);
  if (edge >= 0) out[edge] = from_float<T>(fmaf(exp_fast(to_float(z[edge]) - f.most), f.scale, -f.rest));
  const auto turned = [&](const Vector<T, V>& x) {
    Vector<T, V> g;
#pragma unroll
    for (int j = 0; j < V; ++j) g.at[j] = from_float<T>(fmaf(exp_fast(to_float(x.at[j]) - f.most), f.scale, -f.rest));
    return g;
  };
  int k = t;
  for (; k + (UNROLL - 1) * THREADS < layout.pieces; k += UNROLL * THREADS) {
    Vector<T, V> x[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i)
      x[i] = KEPT ? load_vector<false, Vector<T, V>>((const T*)(kept + k + i * THREADS))
                  : load_vector<true, Vector<T, V>>(z + layout.head + (k + i * THREADS) * V);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i)
      store_vector<true>(out + layout.head + (k + i * THREADS) * V, turned(x[i]));
  }
  for (; k < layout.pieces; k += THREADS) {
    const Vector<T, V> x = KEPT ? load_vector<false, Vector<T, V>>((const T*)(kept + k))
                                : load_vector<true, Vector<T, V>>(z + layout.head + k * V);
    store_vector<true>(out + layout.head + k * V, turned(x));
  }
  for (int c = o.classes + t; c < o.columns; c += THREADS) out[c] = from_float<T>(0.0f);
  __syncthreads();  // another thread has written there
  if (t == 0 && target >= 0 && target < o.classes) out[target] = from_float<T>(f.hit);
}

template <class T, int V, int THREADS>
__device__ __forceinline__ void zero_row(T* out, const Layout<T, V>& layout, int columns) {
  const int t = threadIdx.x, edge = layout.edge(t);
  if (edge >= 0) out[edge] = from_float<T>(0.0f);
  Vector<T, V> zeros;
#pragma unroll
  for (int j = 0; j < V; ++j) zeros.at[j] = from_float<T>(0.0f);
  for (int k = t; k < layout.pieces; k += THREADS) store_vector<true>(out + layout.head + k * V, zeros);
  for (int c = layout.head + layout.pieces * V + layout.tail + t; c < columns; c += THREADS)
    out[c] = from_float<T>(0.0f);
}

enum Mode { LOSS, GRADIENT_KEPT, GRADIENT_REREAD };

template <class T, int THREADS, int MODE>
__global__ void __launch_bounds__(THREADS, THREADS == 512 ? 2 : 1)
    cross_entropy_forward_kernel(T* logits, i64 stride, const i64* targets, float* losses, float* logprobs,
                                 float* statistics, const float* count, Options o) {
  constexpr int V = WIDE<T>, WARPS = THREADS / WARP;
  const int t = threadIdx.x;
  const i64 row = blockIdx.x;
  T* z = logits + row * stride;
  const i64 target = targets[row];
  const Layout<T, V> layout(z, o.classes);
  if (target == o.ignore_index) {
    if (t == 0) {
      losses[row] = 0;
      if (logprobs) logprobs[row] = 0;
      statistics[2 * row] = 0;
      statistics[2 * row + 1] = 1;
    }
    if (MODE != LOSS) zero_row<T, V, THREADS>(z, layout, o.columns);
    return;
  }
  const bool inside = target >= 0 && target < o.classes;
  const float at_target = inside ? to_float(z[target]) : NAN;
  // The mean is taken of z - z_t, so that large logits cancel before they are summed.
  const float shift = fabsf(at_target) < INFINITY ? at_target : 0.0f;
  const bool smooth = o.smoothing != 0;

  unsigned char* memory = &shared_memory<unsigned char>();
  Rooms<WARPS>& rooms = *(Rooms<WARPS>*)memory;
  Vector<T, V>* kept = (Vector<T, V>*)(memory + ROOMS_BYTES);
  Online online;
  const int edge = layout.edge(t);
  if (edge >= 0) {
    const Vector<T, 1> one[1] = {{z[edge]}};
    online.absorb(one, smooth, shift);
  }
  int k = t;
  for (; k + (UNROLL - 1) * THREADS < layout.pieces; k += UNROLL * THREADS) {
    Vector<T, V> x[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i)
      x[i] = load_vector<MODE != GRADIENT_REREAD, Vector<T, V>>(z + layout.head + (k + i * THREADS) * V);
    if (MODE == GRADIENT_KEPT) {
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) store_vector((T*)(kept + k + i * THREADS), x[i]);
    }
    online.absorb(x, smooth, shift);
  }
  for (; k < layout.pieces; k += THREADS) {
    const Vector<T, V> x[1] = {
        load_vector<MODE != GRADIENT_REREAD, Vector<T, V>>(z + layout.head + k * V)};
    if (MODE == GRADIENT_KEPT) store_vector((T*)(kept + k), x[0]);
    online.absorb(x, smooth, shift);
  }

  const float most_of_warp = warp_max(online.most);
  if (t % WARP == 0) rooms.most[t / WARP] = most_of_warp;
  __syncthreads();
  float most = LOWEST;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) most = fmaxf(most, rooms.most[i]);
  const float total = block_sum<WARPS>(online.total * exp_fast(online.most - most), rooms.total);
  const float plain = smooth ? block_sum<WARPS>(online.plain, rooms.plain) : 0.0f;
  if (t == 0) {
    const float log_total = logf(total), logprob = (at_target - most) - log_total;
    float loss = -logprob;
    if (smooth)
      loss = (1 - o.smoothing) * loss + o.smoothing * ((most - shift) + log_total - plain / o.classes);
    if (o.z_loss != 0) {
      const float lse = most + log_total;
      loss += o.z_loss * lse * lse;
    }
    losses[row] = loss;
    if (logprobs) logprobs[row] = logprob;
    statistics[2 * row] = most;
    statistics[2 * row + 1] = total;
  }
  if (MODE == LOSS) return;
  const float u = inside ? (count ? 1 / *count : 1.0f) : NAN;
  const Factors f = factors(u, at_target, most, total, o);
  write_row<T, V, THREADS, MODE == GRADIENT_KEPT>(z, kept, z, target, layout, f, o);
}

template <class T, int V, int THREADS>
__global__ void __launch_bounds__(THREADS)
    cross_entropy_backward_kernel(const float* dloss, i64 dloss_stride, const T* logits, i64 stride,
                                  const i64* targets, const float* statistics, const float* count, T* dlogits,
                                  i64 dlogits_stride, Options o) {
  const i64 row = blockIdx.x;
  const T* z = logits + row * stride;
  T* out = dlogits + row * dlogits_stride;
  const i64 target = targets[row];
  const Layout<T, V> layout(z, o.classes);
  if (target == o.ignore_index) {
    zero_row<T, V, THREADS>(out, layout, o.columns);
    return;
  }
  const bool inside = target >= 0 && target < o.classes;
  const float at_target = inside ? to_float(z[target]) : 0.0f;
  float u = inside ? dloss[row * dloss_stride] : NAN;
  if (count) u /= *count;
  const Factors f = factors(u, at_target, statistics[2 * row], statistics[2 * row + 1], o);
  __syncthreads();  // all have read the target's logit, which may be overwritten now
  write_row<T, V, THREADS, false>(z, nullptr, out, target, layout, f, o);
}

constexpr int LIST_WARPS = 32, LIST_THREADS = LIST_WARPS * WARP;

template <int WARPS>
__global__ void __launch_bounds__(WARPS* WARP)
    cross_entropy_count_kernel(const i64* targets, float* count, i64 rows, i64 ignore_index) {
  struct Shared {
    float room[WARPS];
  };
  int found = 0;
#pragma unroll 8
  for (i64 row = threadIdx.x; row < rows; row += WARPS * WARP) found += targets[row] != ignore_index;
  const float total = block_sum<WARPS>(float(found), shared_memory<Shared>().room);
  if (threadIdx.x == 0) *count = total;
}

template <int WARPS>
__global__ void __launch_bounds__(WARPS* WARP)
    cross_entropy_reduce_kernel(const float* losses, const float* count, float* loss, i64 rows) {
  struct Shared {
    float room[WARPS];
  };
  float sum = 0;
#pragma unroll 8
  for (i64 row = threadIdx.x; row < rows; row += WARPS * WARP) sum += losses[row];
  const float total = block_sum<WARPS>(sum, shared_memory<Shared>().room);
  if (threadIdx.x == 0) *loss = count ? total / *count : total;
}

void cross_entropy_count(uintptr_t targets, uintptr_t count, i64 rows, i64 ignore_index, uintptr_t stream) {
  launch("cross_entropy_count", cross_entropy_count_kernel<LIST_WARPS>, dim3(1), LIST_THREADS,
         LIST_WARPS * sizeof(float), stream, (const i64*)targets, (float*)count, rows, ignore_index);
}

void cross_entropy_reduce(uintptr_t losses, uintptr_t count, uintptr_t loss, i64 rows, uintptr_t stream) {
  launch("cross_entropy_reduce", cross_entropy_reduce_kernel<LIST_WARPS>, dim3(1), LIST_THREADS,
         LIST_WARPS * sizeof(float), stream, (const float*)losses, (const float*)count, (float*)loss, rows);
}

void cross_entropy_forward(uintptr_t logits, i64 stride, uintptr_t targets, uintptr_t losses, uintptr_t logprobs,
                           uintptr_t statistics, uintptr_t count, bool gradient, i64 rows, i64 columns, i64 classes,
                           i64 ignore_index, double smoothing, double z_loss, i64 shared_limit, int dtype,
                           uintptr_t stream) {
  const Options o{int(columns), int(classes), ignore_index, float(smoothing), float(z_loss)};
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const i64 pieces = classes / WIDE<T>, bytes = ROOMS_BYTES + pieces * 16;
    const auto run = [&](auto kernel, int threads, size_t shared) {
      launch("cross_entropy_forward", kernel, dim3(unsigned(rows)), threads, shared, stream, (T*)logits, stride,
             (const i64*)targets, (float*)losses, (float*)logprobs, (float*)statistics, (const float*)count, o);
    };
    // Two blocks of 512 threads on a multiprocessor, or one of 1024 where two rows do not fit.
    const bool small = pieces <= 512, two = 2 * (bytes + 1024) <= shared_limit + 1024;
    if (!gradient && small)
      run(cross_entropy_forward_kernel<T, 128, LOSS>, 128, ROOMS_BYTES);
    else if (!gradient)
      run(cross_entropy_forward_kernel<T, 512, LOSS>, 512, ROOMS_BYTES);
    else if (bytes > shared_limit)
      run(cross_entropy_forward_kernel<T, 1024, GRADIENT_REREAD>, 1024, ROOMS_BYTES);
    else if (small)
      run(cross_entropy_forward_kernel<T, 128, GRADIENT_KEPT>, 128, bytes);
    else if (two)
      run(cross_entropy_forward_kernel<T, 512, GRADIENT_KEPT>, 512, bytes);
    else
      run(cross_entropy_forward_kernel<T, 1024, GRADIENT_KEPT>, 1024, bytes);
  });
}

void cross_entropy_backward(uintptr_t dloss, i64 dloss_stride, uintptr_t logits, i64 stride, uintptr_t targets,
                            uintptr_t statistics, uintptr_t count, uintptr_t dlogits, i64 dlogits_stride, i64 rows,
                            i64 columns, i64 classes, i64 ignore_index, double smoothing, double z_loss, int dtype,
                            uintptr_t stream) {
  const Options o{int(columns), int(classes), ignore_index, float(smoothing), float(z_loss)};
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto run = [&](auto kernel, int threads) {
      launch("cross_entropy_backward", kernel, dim3(unsigned(rows)), threads, 0, stream, (const float*)dloss,
             dloss_stride, (const T*)logits, stride, (const i64*)targets, (const float*)statistics,
             (const float*)count, (T*)dlogits, dlogits_stride, o);
    };
    // Both rows must meet their 16-byte boundaries in the same columns.
    const bool alike = (dlogits - logits) % 16 == 0 && (dlogits_stride - stride) * i64(sizeof(T)) % 16 == 0;
    if (!alike)
      run(cross_entropy_backward_kernel<T, 1, 256>, 256);
    else if (classes <= 512 * WIDE<T>)
      run(cross_entropy_backward_kernel<T, WIDE<T>, 128>, 128);
    else
      run(cross_entropy_backward_kernel<T, WIDE<T>, 512>, 512);
  });
}

}  // namespace cuda
}  // namespace gpt2fast

// AdamW on a whole model in a few launches, and the global norm.
//
//   step      g' = g grad_scale,  m += (1 - beta1) (g' - m),  v += (1 - beta2) (g'^2 - v)
//             p -= lr weight_decay p + lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//   norm      sqrt(sum of all squares)
//   rounding  p to the nearest, or bf16 p, where there is a seed, up or down at random, up with the probability that
//             makes the mean p: 16 random bits are added below the last place and the rest cut off. Element e of
//             tensor t at a step has the word (seed, step, t, 0, e mod 2^32) of common/cuda.h.
//   source    Loshchilov & Hutter 2019, arXiv:1711.05101. Averages are written as differences, since
//             fp32(1) - fp32(0.999) misses 1 - 0.999 by 1e-5 of itself.
//   layout    tensors whose elements lie without gaps, p, g, m, v and master w in one order. p and g fp32,
//             bf16 or fp16; m, v and w fp32. With a master the update is the master's, and p is w rounded.
//   moves     step: p (w instead), m, v, g read, p, m, v (and w) written: 28 bytes a parameter in fp32, 28 in half
//             precision with a master. Norm: g read.
//   work      A block takes CHUNK elements of one tensor; it finds the tensor by bisection in a table of up to
//             60, which is a kernel argument: nothing is copied to the device, and a CUDA graph can hold the
//             launch. A thread has 4 elements at a time: 16 bytes of every fp32 array. Norm: partial sums are
//             fp32 by thread and fp64 by block, taken again in fp64 where squares overflow or vanish; one block
//             adds them in a fixed order: the same inputs give the same bits.
#include "adamw/adamw_cuda.h"

#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

constexpr int TENSORS = 60, ADAMW_THREADS = 128, CHUNK = 8192, FOUR = 4;

struct Entry {
  void *p, *g;
  float *m, *v, *w;
  const float* step;
  i64 size;
};
struct Table {
  Entry entries[TENSORS];
  int places[TENSORS];      // in the list of all tensors
  int starts[TENSORS + 1];  // the first block of each tensor; one past the last
};
static_assert(sizeof(Table) + 128 <= 4096, "kernel arguments end at 4 KB");

struct Scalars {
  const float *lr_tensor, *grad_scale;
  const i64* seed;
  float step, lr, correction1, correction2, log1, log2, new1, old1, new2, old2, eps, weight_decay;
};

// The tensor that this block works on.
__device__ __forceinline__ int owner(const int* starts) {
  int low = 0, high = TENSORS;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= int(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  return low;
}

// 1 - beta^number from the logarithm of beta: a series where the difference would lose digits.
__device__ __forceinline__ float one_minus_power(float log, float number) {
  const float u = log * number;
  if (u > -0.25f) return -u * (1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6 * (1 + u / 7))))));
  return 1 - expf(u);
}

// old + weight (value - old), by the smaller of `weight` and `rest` = 1 - weight.
__device__ __forceinline__ float average(float old, float value, float weight, float rest) {
  return weight <= 0.5f ? old + (value - old) * weight : value + (old - value) * rest;
}

template <int V_>
struct Pieces {
  static constexpr int V = V_;
};

template <class T, int V>
__device__ __forceinline__ void load_floats(const T* place, float (&out)[V]) {
  const auto v = load_vector<true, Vector<T, V>>(place);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = to_float(v.at[j]);
}
template <class T, int V>
__device__ __forceinline__ void store_floats(T* place, const float (&x)[V]) {
  Vector<T, V> v;
#pragma unroll
  for (int j = 0; j < V; ++j) v.at[j] = from_float<T>(x[j]);
  store_vector<true>(place, v);
}

// x as one of the two bf16 numbers around it; a NaN stays.
__device__ __forceinline__ float round_stochastically(float x, uint32_t word) {
  return x != x ? x : __uint_as_float((__float_as_uint(x) + (word >> 16)) & 0xffff0000u);
}

template <class T, int V, int THREADS>
__global__ void __launch_bounds__(THREADS) adamw_kernel(const __grid_constant__ Table table, Scalars s) {
  const int tensor = owner(table.starts);
  const Entry& e = table.entries[tensor];
  const i64 start = i64(blockIdx.x - table.starts[tensor]) * CHUNK;
  const i64 size = e.size - start < CHUNK ? e.size - start : CHUNK;
  T *p = (T*)e.p + start, *g = (T*)e.g + start;
  float *m = e.m + start, *v = e.v + start, *w = e.w ? e.w + start : nullptr;
  if (e.step) {
    s.step = *e.step;
    s.correction1 = one_minus_power(s.log1, s.step);
    s.correction2 = one_minus_power(s.log2, s.step);
  }
  RandomRow random;
  if (s.seed) random = RandomRow(*s.seed, uint32_t(s.step), uint32_t(table.places[tensor]), 0);
  const float lr = s.lr_tensor ? *s.lr_tensor : s.lr, scale = s.grad_scale ? *s.grad_scale : 1.0f;
  const float decay = lr * s.weight_decay, rate = lr / s.correction1, root = 1 / sqrtf(s.correction2);
  const auto update = [&](auto width, i64 at) {
    constexpr int N = decltype(width)::V;
    float grad[N], first[N], second[N], value[N];
    load_floats<T, N>(g + at, grad);
    load_floats<float, N>(m + at, first);
    load_floats<float, N>(v + at, second);
    if (w)
      load_floats<float, N>(w + at, value);
    else
      load_floats<T, N>(p + at, value);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = grad[j] * scale;
      first[j] = average(first[j], d, s.new1, s.old1);
      second[j] = average(second[j], d * d, s.new2, s.old2);
      value[j] -= value[j] * decay + first[j] / (sqrtf(second[j]) * root + s.eps) * rate;
    }
    store_floats<float, N>(m + at, first);
    store_floats<float, N>(v + at, second);
    if (w) store_floats<float, N>(w + at, value);
    if constexpr (std::is_same<T, bf16>::value)
      if (s.seed) {
#pragma unroll
        for (int j = 0; j < N; ++j) value[j] = round_stochastically(value[j], random.word(uint32_t(start + at + j)));
      }
    store_floats<T, N>(p + at, value);
  };
  const i64 whole = size / V * V;
#pragma unroll 2
  for (i64 at = i64(threadIdx.x) * V; at < whole; at += THREADS * V) update(Pieces<V>(), at);
  if (threadIdx.x < size - whole) update(Pieces<1>(), whole + threadIdx.x);
}

template <int WARPS>
__device__ __forceinline__ double block_sum(double x, double (&room)[WARPS]) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) total += room[i];
  return total;
}

template <class T, int V, int THREADS>
__global__ void __launch_bounds__(THREADS) squares_kernel(const __grid_constant__ Table table, double* partials) {
  struct Shared {
    double rooms[2][THREADS / WARP];
  };
  Shared& shared = shared_memory<Shared>();
  const int tensor = owner(table.starts);
  const Entry& e = table.entries[tensor];
  const i64 start = i64(blockIdx.x - table.starts[tensor]) * CHUNK;
  const i64 size = e.size - start < CHUNK ? e.size - start : CHUNK, whole = size / V * V;
  const T* x = (const T*)e.p + start;
  float sum = 0;
#pragma unroll 4
  for (i64 at = i64(threadIdx.x) * V; at < whole; at += THREADS * V) {
    float part[V];
    load_floats<T, V>(x + at, part);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += part[j] * part[j];
  }
  for (i64 at = whole + threadIdx.x; at < size; at += THREADS) sum += to_float(x[at]) * to_float(x[at]);
  double total = block_sum(double(sum), shared.rooms[0]);
  if (!(total > 1e-20 && total < 1e37)) {  // squares may have vanished or overflowed (or there is a NaN)
    double wide = 0;
    for (i64 at = threadIdx.x; at < size; at += THREADS) wide += double(to_float(x[at])) * to_float(x[at]);
    total = block_sum(wide, shared.rooms[1]);
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

template <int WARPS>
__global__ void __launch_bounds__(WARPS* WARP) norm_kernel(const double* partials, float* norm, i64 count) {
  struct Shared {
    double room[WARPS];
  };
  double sum = 0;
#pragma unroll 8
  for (i64 i = threadIdx.x; i < count; i += WARPS * WARP) sum += partials[i];
  const double total = block_sum(sum, shared_memory<Shared>().room);
  if (threadIdx.x == 0) *norm = float(sqrt(total));
}

// body(table, blocks, dtype, wide) for tensors that share a launch: of one dtype and alignment, in the order given.
template <class Fill, class Body>
static void in_groups(i64 count, const Fill& fill, const Body& body) {
  for (int dtype = 0; dtype < 3; ++dtype)
    for (int wide = 0; wide < 2; ++wide) {
      Table table = {};
      int used = 0;
      const auto flush = [&] {
        for (int i = used + 1; i <= TENSORS; ++i) table.starts[i] = table.starts[used];
        if (used) body(table, table.starts[used], dtype, wide != 0);
        used = 0;
      };
      for (i64 i = 0; i < count; ++i) {
        Entry e = {};
        bool is_wide;
        if (fill(i, e, is_wide) != dtype || is_wide != (wide != 0) || e.size == 0) continue;
        table.entries[used] = e;
        table.places[used] = int(i);
        table.starts[used + 1] = table.starts[used] + int(ceil_div(e.size, CHUNK));
        if (++used == TENSORS) flush();
      }
      flush();
    }
}

void adamw_step(uintptr_t table_, i64 count, uintptr_t lr_tensor, uintptr_t grad_scale, uintptr_t seed,
                double step, double lr, double correction1, double correction2, double log1, double log2,
                double beta1, double beta2, double eps, double weight_decay, uintptr_t stream) {
  const i64* rows = (const i64*)table_;
  const Scalars s{(const float*)lr_tensor, (const float*)grad_scale, (const i64*)seed, float(step), float(lr),
                  float(correction1), float(correction2), float(log1), float(log2), float(1 - beta1), float(beta1),
                  float(1 - beta2), float(beta2), float(eps), float(weight_decay)};
  const auto fill = [&](i64 i, Entry& e, bool& wide) {
    const i64* r = rows + 8 * i;
    e = {(void*)r[0], (void*)r[1], (float*)r[2], (float*)r[3], (float*)r[4], (const float*)r[5], r[6]};
    wide = (r[0] | r[1] | r[2] | r[3] | r[4]) % 16 == 0;
    return int(r[7]);
  };
  in_groups(count, fill, [&](const Table& table, int blocks, int dtype, bool wide) {
    with_dtype(dtype, [&](auto kind) {
      using T = decltype(kind);
      const auto kernel = wide ? adamw_kernel<T, FOUR, ADAMW_THREADS> : adamw_kernel<T, 1, ADAMW_THREADS>;
      launch("adamw_step", kernel, dim3(unsigned(blocks)), ADAMW_THREADS, 0, stream, table, s);
    });
  });
}

i64 global_norm_partials(uintptr_t table, i64 count) {
  i64 blocks = 0;
  for (i64 i = 0; i < count; ++i) blocks += ceil_div(((const i64*)table)[3 * i + 1], CHUNK);
  return blocks;
}

void global_norm(uintptr_t partials_, uintptr_t norm, uintptr_t table_, i64 count, uintptr_t stream) {
  const i64* rows = (const i64*)table_;
  double* partials = (double*)partials_;
  i64 used = 0;
  const auto fill = [&](i64 i, Entry& e, bool& wide) {
    const i64* r = rows + 3 * i;
    e.p = (void*)r[0];
    e.size = r[1];
    wide = r[0] % 16 == 0;
    return int(r[2]);
  };
  in_groups(count, fill, [&](const Table& table, int blocks, int dtype, bool wide) {
    with_dtype(dtype, [&](auto kind) {
      using T = decltype(kind);
      const auto kernel = wide ? squares_kernel<T, WIDE<T>, ADAMW_THREADS> : squares_kernel<T, 1, ADAMW_THREADS>;
      launch("global_norm", kernel, dim3(unsigned(blocks)), ADAMW_THREADS,
             2 * ADAMW_THREADS / WARP * sizeof(double), stream, table, partials + used);
    });
    used += blocks;
  });
  launch("global_norm", norm_kernel<32>, dim3(1), 1024, 32 * sizeof(double), stream, (const double*)partials,
         (float*)norm, used);
}

}  // namespace cuda
}  // namespace gpt2fast

// Token and position embedding.
//
//   forward   out[b, t] = wte[idx[b, t]] + wpe[position + t]
//   backward  dwte[v] = sum of dy[b, t] over all b, t with idx[b, t] = v;  dwpe[position + t] = sum over b
//   source    definition.
//   layout    idx (B, T) int64 of any strides; tables with contiguous columns and any row stride; dy rows
//             (B T, C) with any row stride. Gradients are dense, of dy's dtype, summed in fp32.
//   moves     forward reads idx and a row of each table (positions come from the cache) and writes out once.
//             Backward reads dy once for each table; dwte was cleared, and its named rows are written.
//   work      Forward: a thread has 16 bytes of columns. dwpe: a thread has 16 bytes of columns of a position
//             and walks over the batch. dwte: the tokens come sorted with their places, so a token's rows stand
//             side by side. A block sums TILE sorted rows: whole runs of one token go to the table, the
//             unfinished run at either end to partial sums, which a second kernel adds up: no block has more
//             than TILE rows, however often a token comes. Every sum has one fixed order and there are no
//             atomics, so the same inputs give the same bits. All sizes are known on the host.
//   errors    A token outside of the table is a breach of contract that cannot be reported without waiting for
//             the device: its row of out is NaN and its gradient goes nowhere.
//   saves     idx.
#include "embedding/embedding_cuda.h"

#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

constexpr int TILE = 32, EMBEDDING_THREADS = 128, AT_ONCE = 4;

template <class T, int V>
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward_kernel(const i64* idx, i64 idx_sequence, i64 idx_step, const T* wte, i64 wte_stride,
                             const T* wpe, i64 wpe_stride, T* out, i64 length, int columns, i64 vocabulary) {
  const i64 b = blockIdx.x / length, t = blockIdx.x % length;
  const i64 token = idx[b * idx_sequence + t * idx_step];
  const bool known = token >= 0 && token < vocabulary;
  for (int c = threadIdx.x * V; c < columns; c += EMBEDDING_THREADS * V) {
    Vector<T, V> x, y;
    if (known) x = load_vector<false, Vector<T, V>>(wte + token * wte_stride + c);
    y = load_vector<false, Vector<T, V>>(wpe + t * wpe_stride + c);
#pragma unroll
    for (int j = 0; j < V; ++j) y.at[j] = from_float<T>(known ? to_float(x.at[j]) + to_float(y.at[j]) : NAN);
    store_vector(out + i64(blockIdx.x) * columns + c, y);
  }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    embedding_keys_kernel(const i64* idx, i64 idx_sequence, i64 idx_step, int* keys, i64 count, i64 length,
                          i64 vocabulary) {
  const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= count) return;
  const i64 token = idx[i / length * idx_sequence + i % length * idx_step];
  keys[i] = int(token >= 0 && token < vocabulary ? token : vocabulary);
}

// Stores fp32 sums: to a table of T, or to partial sums.
template <class T, int V>
__device__ __forceinline__ void store_sums(T* place, const float (&sum)[V]) {
  Vector<T, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out.at[j] = from_float<T>(sum[j]);
  store_vector(place, out);
}
template <int V>
__device__ __forceinline__ void store_partial(float* place, const float (&sum)[V]) {
  constexpr int PART = V < 4 ? V : 4;
#pragma unroll
  for (int j = 0; j < V; j += PART) {
    Vector<float, PART> out;
#pragma unroll
    for (int k = 0; k < PART; ++k) out.at[k] = sum[j + k];
    store_vector(place + j, out);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(EMBEDDING_THREADS, 6)  // asked for fewer, ptxas spills for sm_80
    embedding_tokens_kernel(const T* dy, i64 dy_stride, const int* keys, const i64* order, T* dwte, float* partials,
                            i64 count, int columns, i64 vocabulary) {
  const int c = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * V;
  if (c >= columns) return;
  const i64 start = i64(blockIdx.x) * TILE, end = start + TILE < count ? start + TILE : count;
  float* head = partials + i64(blockIdx.x) * 2 * columns + c;
  float sum[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = 0;
  // `begun`: the run at hand began in this tile. What an earlier tile began goes to the head.
  bool begun = start == 0 || keys[start - 1] != keys[start];
  for (i64 first = start; first < end; first += AT_ONCE) {
    Vector<T, V> rows[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + i < end) rows[i] = load_vector<true, Vector<T, V>>(dy + order[first + i] * dy_stride + c);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const i64 at = first + i;
      if (at >= end) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += to_float(rows[i].at[j]);
      const int key = keys[at];
      if (at + 1 < count && keys[at + 1] == key) continue;
      if (begun) {
        if (key < vocabulary) store_sums(dwte + i64(key) * columns + c, sum);
      } else {
        store_partial(head, sum);
      }
      begun = true;
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] = 0;
    }
  }
  // What the next tile goes on with: a run that began here, or one that fills the tile.
  store_partial(begun ? head + columns : head, sum);
}

// The run that begins in a tile and ends in a later one: its tail here and its heads there.
template <class T, int V>
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_join_kernel(const int* keys, const float* partials, T* dwte, i64 count, int columns, i64 vocabulary) {
  const i64 start = i64(blockIdx.x) * TILE, end = start + TILE;
  const int c = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * V;
  if (end >= count || c >= columns) return;
  const int key = keys[end - 1];
  const bool begun = start == 0 || keys[start - 1] != key;
  if (!begun || keys[end] != key || key >= vocabulary) return;
  float sum[V];
  const auto add = [&](const float* place) {
    constexpr int PART = V < 4 ? V : 4;
#pragma unroll
    for (int j = 0; j < V; j += PART) {
      const auto part = load_vector<false, Vector<float, PART>>(place + j);
#pragma unroll
      for (int k = 0; k < PART; ++k) sum[j + k] += part.at[k];
    }
  };
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = 0;
  add(partials + (i64(blockIdx.x) * 2 + 1) * columns + c);
  for (i64 at = end; at < count && keys[at] == key; at += TILE) add(partials + at / TILE * 2 * columns + c);
  store_sums(dwte + i64(key) * columns + c, sum);
}

template <class T, int V>
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_positions_kernel(const T* dy, i64 dy_stride, T* dwpe, i64 batch, i64 length, int columns,
                               i64 position) {
  const int c = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * V;
  if (c >= columns) return;
  const i64 t = i64(blockIdx.x) - position;
  float sum[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = 0;
  if (t >= 0 && t < length)
    for (i64 group = 0; group < batch; group += 256) {  // sums of sums: a long batch is as accurate as a short one
      float part[V];
#pragma unroll
      for (int j = 0; j < V; ++j) part[j] = 0;
      const i64 end = group + 256 < batch ? group + 256 : batch;
      for (i64 b = group; b < end; b += AT_ONCE) {
        Vector<T, V> rows[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
          if (b + i < end) rows[i] = load_vector<true, Vector<T, V>>(dy + ((b + i) * length + t) * dy_stride + c);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
          if (b + i < end)
#pragma unroll
            for (int j = 0; j < V; ++j) part[j] += to_float(rows[i].at[j]);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += part[j];
    }
  store_sums(dwpe + i64(blockIdx.x) * columns + c, sum);
}

// body(Width<V>()) with 16 bytes a thread where `wide`, else single elements.
template <int V_>
struct Width {
  static constexpr int V = V_;
};
template <class T, class Body>
static void with_width(bool wide, const Body& body) {
  if (wide)
    body(Width<WIDE<T>>());
  else
    body(Width<1>());
}

void embedding_forward(uintptr_t idx, i64 idx_sequence, i64 idx_step, uintptr_t wte, i64 wte_stride, uintptr_t wpe,
                       i64 wpe_stride, uintptr_t out, i64 batch, i64 length, i64 columns, i64 vocabulary, int dtype,
                       uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const bool wide = aligned<T>(wte, wte_stride) && aligned<T>(wpe, wpe_stride) && aligned<T>(out, columns);
    with_width<T>(wide, [&](auto width) {
      launch("embedding_forward", embedding_forward_kernel<T, decltype(width)::V>, dim3(unsigned(batch * length)),
             EMBEDDING_THREADS, 0, stream, (const i64*)idx, idx_sequence, idx_step, (const T*)wte, wte_stride,
             (const T*)wpe, wpe_stride, (T*)out, length, int(columns), vocabulary);
    });
  });
}

void embedding_keys(uintptr_t idx, i64 idx_sequence, i64 idx_step, uintptr_t keys, i64 batch, i64 length,
                    i64 vocabulary, uintptr_t stream) {
  launch("embedding_keys", embedding_keys_kernel<256>, dim3(unsigned(ceil_div(batch * length, 256))), 256, 0, stream,
         (const i64*)idx, idx_sequence, idx_step, (int*)keys, batch * length, length, vocabulary);
}

void embedding_tokens(uintptr_t dy, i64 dy_stride, uintptr_t keys, uintptr_t order, uintptr_t dwte,
                      uintptr_t partials, i64 count, i64 columns, i64 vocabulary, int dtype, uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    with_width<T>(aligned<T>(dy, dy_stride) && aligned<T>(dwte, columns), [&](auto width) {
      constexpr int V = decltype(width)::V;
      const dim3 grid(unsigned(ceil_div(count, TILE)), unsigned(ceil_div(columns, V * EMBEDDING_THREADS)));
      launch("embedding_tokens", embedding_tokens_kernel<T, V>, grid, EMBEDDING_THREADS, 0, stream, (const T*)dy,
             dy_stride, (const int*)keys, (const i64*)order, (T*)dwte, (float*)partials, count, int(columns),
             vocabulary);
      launch("embedding_tokens", embedding_join_kernel<T, V>, grid, EMBEDDING_THREADS, 0, stream, (const int*)keys,
             (const float*)partials, (T*)dwte, count, int(columns), vocabulary);
    });
  });
}

void embedding_positions(uintptr_t dy, i64 dy_stride, uintptr_t dwpe, i64 batch, i64 length, i64 columns,
                         i64 positions, i64 position, int dtype, uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    with_width<T>(aligned<T>(dy, dy_stride) && aligned<T>(dwpe, columns), [&](auto width) {
      constexpr int V = decltype(width)::V;
      const dim3 grid(unsigned(positions), unsigned(ceil_div(columns, V * EMBEDDING_THREADS)));
      launch("embedding_positions", embedding_positions_kernel<T, V>, grid, EMBEDDING_THREADS, 0, stream,
             (const T*)dy, dy_stride, (T*)dwpe, batch, length, int(columns), position);
    });
  });
}

}  // namespace cuda
}  // namespace gpt2fast

// What the attention kernels share, with tensor cores (attention.cu, attention_hopper.cu) and without
// (attention_fma.cu): the problem, the part of it that a block has, tiles of shared memory, and what a row knows.
#pragma once
#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {
namespace attention {

constexpr float LOG2_E = 1.4426950408889634f;

// A (B, T, H, D) view with contiguous D; documents in one row have batch = 0.
template <class T>
struct View {
  T* data;
  i64 batch, row, head;
  __device__ T* at(int b, int h, i64 t) const { return data + b * batch + h * head + t * row; }
};

template <class T>
struct Forward {
  View<const T> q, k, v;
  View<T> out;
  float* lse;
};
template <class T>
struct Backward {
  View<const T> dout, q, k, v, out;
  View<T> dq, dk, dv;
  const float* lse;
  float* delta;
};

// The tensors with the type of their elements.
template <class T, class Untyped>
View<T> typed(const View<Untyped>& v) {
  return {(T*)v.data, v.batch, v.row, v.head};
}
template <class T>
Forward<T> typed(const Forward<void>& t) {
  return {typed<const T>(t.q), typed<const T>(t.k), typed<const T>(t.v), typed<T>(t.out), t.lse};
}
template <class T>
Backward<T> typed(const Backward<void>& t) {
  return {typed<const T>(t.dout), typed<const T>(t.q), typed<const T>(t.k), typed<const T>(t.v), typed<const T>(t.out),
          typed<T>(t.dq),         typed<T>(t.dk),      typed<T>(t.dv),      t.lse,               t.delta};
}

struct Problem {
  i64 lse_batch, lse_head, lse_plane;
  const int *q_starts, *k_starts;  // null: a batch
  const i64* seed;                 // null: no dropout
  int batch, heads, queries, keys, size, diagonal;
  bool causal;
  float scale, factor;
  int threshold;
};

// How blocks are dealt out: heads run in groups whose keys and values share the L2 cache; within a group the
// longest tile of every head comes first, so that short ones fill the gaps at the end.
struct Schedule {
  int tiles, group;
};
constexpr i64 GROUP_BYTES = 16 << 20;

inline Schedule schedule(i64 length, int rows, i64 read_again, int size, int itemsize) {
  const i64 bytes = 2 * read_again * size * itemsize;
  return {int(ceil_div(length, rows)), bytes < GROUP_BYTES ? int(GROUP_BYTES / (bytes + 1)) + 1 : 1};
}
inline dim3 grid_of(const Problem& problem, const Schedule& s) {
  const i64 blocks = i64(s.tiles) * problem.batch * problem.heads;
  if (blocks > 0x7fffffff) throw std::runtime_error("gpt2fast CUDA attention: too many heads and rows for a grid");
  return dim3(unsigned(blocks));
}

// The tile of a head that a block has. Query i sees keys j <= i + diagonal: all of them where not causal.
struct Place {
  int tile, b, h, queries, keys, diagonal;
  i64 q_first, k_first, lse;
};

template <bool LAST_FIRST>
__device__ __forceinline__ Place place_of_block(const Problem& problem, const Schedule& s, int block) {
  const int all = problem.batch * problem.heads;
  const int first = block / s.tiles / s.group * s.group;
  const int within = block - first * s.tiles, width = all - first < s.group ? all - first : s.group;
  const int tile = within / width, head = first + within % width;
  Place p;
  p.tile = LAST_FIRST ? s.tiles - 1 - tile : tile;
  p.b = head / problem.heads;
  p.h = head % problem.heads;
  p.queries = problem.queries;
  p.keys = problem.keys;
  p.q_first = p.k_first = 0;
  int diagonal = problem.diagonal;
  if (problem.q_starts) {
    p.q_first = problem.q_starts[p.b];
    p.k_first = problem.k_starts[p.b];
    p.queries = int(problem.q_starts[p.b + 1] - p.q_first);
    p.keys = int(problem.k_starts[p.b + 1] - p.k_first);
    diagonal = p.keys - p.queries;
  }
  p.diagonal = problem.causal ? diagonal : p.keys;
  p.lse = p.b * problem.lse_batch + p.h * problem.lse_head + p.q_first;
  return p;
}

// x, but no less than 0 and no more than `most`.
__device__ __forceinline__ int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

// The largest of the four lanes that share a row, and the sum.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

// A query's lse and what its rounding left out, in base 2: the sum is of 2^(S log2 e - top); 0 without a key.
__device__ __forceinline__ void store_level(float* lse, i64 plane, float top, float sum) {
  const bool none = sum == 0;
  const float log_sum = log2f(sum), level = top + log_sum;
  lse[0] = none ? INFINITY : level;
  lse[plane] = none ? 0.0f : top - level + log_sum;
}

// Rows of shared memory in chunks of 16 bytes, which are exchanged within a row so that neither 8 rows of one
// chunk nor 8 chunks of one row meet in a bank.
template <class T, int ROWS, int WIDTH>
struct alignas(16) Tile {
  static constexpr int CHUNK = WIDE<T>, CHUNKS = WIDTH / CHUNK;
  static_assert(CHUNKS % 8 == 0, "the exchange needs rows of at least 8 chunks");
  T data[ROWS * WIDTH];
  __device__ T* at(int row, int chunk) { return data + row * WIDTH + (chunk ^ (row & 7)) * CHUNK; }
};

// The kernels without tensor cores, for fp32, any head size up to 256 and any alignment.
void forward_fma(const Forward<void>& tensors, const Problem& problem, int dtype, uintptr_t stream);
void backward_fma(const Backward<void>& tensors, const Problem& problem, int dtype, uintptr_t stream);

}  // namespace attention
}  // namespace cuda
}  // namespace gpt2fast

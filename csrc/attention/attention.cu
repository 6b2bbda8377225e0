// Attention on tensor cores (mma.sync, bf16 and fp16): no (T x T) matrix in memory, one kernel forward and two
// backward.
//
//   forward   S = scale q k^T, key j hidden from query i where j > i + diagonal;  P = softmax(S)
//             out = M P v,  lse = log2(sum over j of 2^(S log2 e));  M = dropout's mask / (1 - p), or 1
//   backward  P = 2^(S log2 e - lse);  dP = M (dout v^T);  delta = rowsum(dout out);  dS = P (dP - delta)
//             dv = (M P)^T dout;  dk = scale dS^T q;  dq = scale dS k
//   source    Dao et al. 2022, 2023 (FlashAttention 1 and 2); Milakov and Gimelshein 2018 (online softmax).
//   layout    (B, T, H, D) with any strides but a contiguous D: views of a packed qkv are read and those of a packed
//             gradient written in place. Or documents in one row of (total, H, D), document b from starts[b] to
//             starts[b + 1]. Rows that start on 16 bytes and D <= 128; the others: attention_fma.cu.
//   moves     forward reads q once and writes out once, reads k and v once per row tile; dq reads q, dout, out once
//             and k, v once per row tile; dk, dv read k, v once and q, dout once per key tile. Tiles of one head run
//             close together, so that what is read again lies in L2. Of D operations a visible pair: 4 forward, 14
//             backward (seven products: S and dP are computed twice; five would need dq summed by atomics, in a
//             different order each time).
//   work      four warps have 16 M rows each (queries of forward and dq, keys of dk and dv), whose fragments stay in
//             registers, and walk over the tiles of the other side, which cp.async brings while the last one is
//             worked on: one barrier a tile. A tile's accumulators become the left operand of the next product in
//             registers: P for P v, dS for dS k, and since the third kernel forms S^T, P^T and dS^T, too. The
//             backward needs no maximum, so it goes by 16 columns, which leaves registers for the results. Only
//             tiles on the diagonal or at an end are masked. No sum crosses blocks: same inputs, same bits.
//   saves     lse and what its rounding to fp32 left out, (2, B, H, T), in base 2; without a key lse is infinity,
//             which makes P zero. The dropout mask is a hash of (seed, b, h, i, j), formed again.
//   rounds    P and dS are rounded to the inputs' dtype before their products, which sum in fp32.
#include "attention/attention_cuda.h"
#include "attention/attention_problem.h"
#include "common/mma.h"

namespace gpt2fast {
namespace cuda {
namespace attention {

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// ---- tiles and fragments -------------------------------------------------------------------------------

// Starts to copy ROWS rows `from`, of which `count` are real, and zeros.
template <class T, int ROWS, int WIDTH>
__device__ __forceinline__ void copy_tile(Tile<T, ROWS, WIDTH>& tile, const T* from, i64 stride, int count, int size) {
  using Rows = Tile<T, ROWS, WIDTH>;
  constexpr int STEP = THREADS / Rows::CHUNKS;
  static_assert(THREADS % Rows::CHUNKS == 0 && ROWS % STEP == 0, "every thread copies as much");
  const int chunk = threadIdx.x % Rows::CHUNKS, first = threadIdx.x / Rows::CHUNKS;
  const T* place = from + first * stride + chunk * Rows::CHUNK;
  const bool inside = chunk * Rows::CHUNK < size;
#pragma unroll
  for (int row = 0; row < ROWS; row += STEP) {
    const bool real = inside && row + first < count;
    copy_async(tile.at(row + first, chunk), real ? place : from, real ? 16 : 0);
    place += STEP * stride;
  }
}

// The left operand: 16 rows from `row` on, columns from 16 `step` on.
template <class Rows>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], Rows& tile, int row, int step) {
  const int lane = threadIdx.x % WARP;
  ldmatrix(a, tile.at(row + lane % 16, 2 * step + lane / 16));
}
// Two right operands, for 16 columns of the product: the tile's rows from `row` on, over its columns from 16 `step` on.
template <class Rows>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], Rows& tile, int row, int step) {
  const int lane = threadIdx.x % WARP;
  ldmatrix(b, tile.at(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}
// The same for the tile's columns from 16 `part` on, over its rows from `row` on.
template <class Rows>
__device__ __forceinline__ void load_right_transposed(uint32_t (&b)[4], Rows& tile, int row, int part) {
  const int lane = threadIdx.x % WARP;
  ldmatrix_transposed(b, tile.at(row + lane % 16, 2 * part + lane / 16));
}

// Accumulators of 16 rows and two times 8 columns as a left operand. Element i of c[n] is in row
// lane / 4 + 8 (i / 2), column 8 n + 2 (lane % 4) + i % 2.
template <class T>
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = pack<T>(first[0], first[1]);
  a[1] = pack<T>(first[2], first[3]);
  a[2] = pack<T>(second[0], second[1]);
  a[3] = pack<T>(second[2], second[3]);
}

template <int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
}

// Writes 16 rows of results, times a factor for the upper and the lower eight, of which `count` are real. They go
// through rows of a tile that only this warp uses, so that 16 bytes are written at once.
template <class T, int N, class Rows>
__device__ __forceinline__ void store_rows(T* to, i64 stride, const float (&c)[N][4], float upper, float lower, Rows& tile,
                                           int row, int count, int size) {
  const int lane = threadIdx.x % WARP;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    *(uint32_t*)(tile.at(row + lane / 4, n) + lane % 4 * 2) = pack<T>(c[n][0] * upper, c[n][1] * upper);
    *(uint32_t*)(tile.at(row + lane / 4 + 8, n) + lane % 4 * 2) = pack<T>(c[n][2] * lower, c[n][3] * lower);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * N; i += WARP) {
    const int r = (i + lane) / N, chunk = (i + lane) % N;
    if (r < count && chunk * Rows::CHUNK < size)
      store_vector(to + r * stride + chunk * Rows::CHUNK, load_vector<false, Vector<T, 8>>(tile.at(row + r, chunk)));
  }
}

// ---- forward -------------------------------------------------------------------------------------------

// Rows of 16 for each warp, and how many keys or queries are taken at a time.
template <int M_, int COLUMNS_, int BLOCKS_>
struct Shape {
  static constexpr int M = M_, COLUMNS = COLUMNS_, ROWS = 16 * M * WARPS;
  static constexpr int BLOCKS = BLOCKS_;  // how many should fit on a multiprocessor
};

template <class T, int WIDTH, class S>
struct ForwardShared {
  Tile<T, S::ROWS, WIDTH> q;
  Tile<T, S::COLUMNS, WIDTH> k[2], v[2];
};

// What a warp knows of its 16 M queries.
template <int WIDTH, int M>
struct Softmax {
  float out[M][WIDTH / 8][4];
  float top[M][2], total[M][2];  // total: of this lane's columns
  RandomRow mask[M][2];
};

// Takes COLUMNS keys from `start` on into the softmax.
template <class T, int WIDTH, class S, bool DROPOUT, bool MASKED>
__device__ __forceinline__ void attend(Softmax<WIDTH, S::M>& softmax, const uint32_t (&q)[S::M][WIDTH / 16][4],
                                       Tile<T, S::COLUMNS, WIDTH>& k, Tile<T, S::COLUMNS, WIDTH>& v, int row, int start,
                                       float scale, const Place& place, const Problem& problem) {
  constexpr int M = S::M, N = S::COLUMNS / 8;
  const int column = start + threadIdx.x % 4 * 2;
  float s[M][N][4];
#pragma unroll
  for (int m = 0; m < M; ++m) clear(s[m]);
#pragma unroll
  for (int step = 0; step < WIDTH / 16; ++step)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_right(b, k, 8 * n, step);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(s[m][n], q[m][step], b[0], b[1]);
        mma<T>(s[m][n + 1], q[m][step], b[2], b[3]);
      }
    }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (MASKED) {
        const int seen = clamp(row + 16 * m + 8 * half + place.diagonal + 1, place.keys);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i)
            if (column + 8 * n + i % 2 >= seen) s[m][n][i] = -INFINITY;
      }
      float now = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) now = fmaxf(now, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      now = fmaxf(softmax.top[m][half], quad_max(now) * scale);
      if (MASKED) now = fmaxf(now, -1e38f);  // a number even where no key was seen yet
      const float rescale = exp2_fast(softmax.top[m][half] - now);
      softmax.top[m][half] = now;
      float total = softmax.total[m][half] * rescale;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float p = exp2_fast(MASKED ? s[m][n][i] * scale - now : fmaf(s[m][n][i], scale, -now));
          total += p;
          s[m][n][i] = p;
          if (DROPOUT && !softmax.mask[m][half].kept(column + 8 * n + i % 2, problem.threshold)) s[m][n][i] = 0;
        }
      softmax.total[m][half] = total;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
        softmax.out[m][n][2 * half] *= rescale;
        softmax.out[m][n][2 * half + 1] *= rescale;
      }
    }
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t p[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) as_left<T>(p[m], s[m][n], s[m][n + 1]);
#pragma unroll
    for (int part = 0; part < WIDTH / 16; ++part) {
      uint32_t b[4];
      load_right_transposed(b, v, 8 * n, part);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(softmax.out[m][2 * part], p[m], b[0], b[1]);
        mma<T>(softmax.out[m][2 * part + 1], p[m], b[2], b[3]);
      }
    }
  }
}

template <class T, int WIDTH, class S, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, S::BLOCKS)
    forward_kernel(Forward<T> tensors, Problem problem, Schedule schedule) {
  constexpr int M = S::M, COLUMNS = S::COLUMNS;
  using Shared = ForwardShared<T, WIDTH, S>;
  Shared& shared = shared_memory<Shared>();
  const Place place = place_of_block<true>(problem, schedule, int(blockIdx.x));
  const int begin = place.tile * S::ROWS;
  if (begin >= place.queries) return;
  const int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16 * M, row = begin + own + lane / 4;
  const i64 q_row = place.q_first + begin;
  const T* k = tensors.k.at(place.b, place.h, place.k_first);
  const T* v = tensors.v.at(place.b, place.h, place.k_first);
  // Keys that any of the rows sees, and those that all of them see.
  const int end = clamp(begin + S::ROWS + place.diagonal, place.keys);
  const int whole = clamp(begin + place.diagonal + 1, place.keys) / COLUMNS * COLUMNS;
  const auto copy_keys = [&](int start, int turn) {
    copy_tile(shared.k[turn], k + start * tensors.k.row, tensors.k.row, place.keys - start, problem.size);
    copy_tile(shared.v[turn], v + start * tensors.v.row, tensors.v.row, place.keys - start, problem.size);
  };
  copy_tile(shared.q, tensors.q.at(place.b, place.h, q_row), tensors.q.row, place.queries - begin, problem.size);
  copy_async_commit();
  if (end > 0) copy_keys(0, 0);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  uint32_t q[M][WIDTH / 16][4];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
      load_left(q[m][step], shared.q, own + 16 * m, step);
#pragma unroll
      for (int i = 0; i < 4; ++i)  // so that the largest product is that of the largest score
        if (problem.scale < 0) q[m][step][i] ^= 0x80008000u;
    }
  const float scale = fmaxf(fabsf(problem.scale) * LOG2_E, 1e-37f);  // not 0: a hidden key's score is -infinity
  Softmax<WIDTH, M> softmax;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    clear(softmax.out[m]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.top[m][half] = -INFINITY;
      softmax.total[m][half] = 0;
      if (DROPOUT) softmax.mask[m][half] = RandomRow(*problem.seed, place.b, place.h, row + 16 * m + 8 * half);
    }
  }
  int turn = 0;
  for (int start = 0; start < end; start += COLUMNS, turn ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and the last one has been read
    if (start + COLUMNS < end) copy_keys(start + COLUMNS, turn ^ 1);
    copy_async_commit();
    if (start < whole)
      attend<T, WIDTH, S, DROPOUT, false>(softmax, q, shared.k[turn], shared.v[turn], row, start, scale, place, problem);
    else
      attend<T, WIDTH, S, DROPOUT, true>(softmax, q, shared.k[turn], shared.v[turn], row, start, scale, place, problem);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(softmax.total[m][half]), top = softmax.top[m][half];
      factor[half] = sum == 0 ? 0.0f : problem.factor / sum;
      const int r = row + 16 * m + 8 * half;
      if (lane % 4 == 0 && r < place.queries) store_level(tensors.lse + place.lse + r, problem.lse_plane, top, sum);
    }
    const int first = own + 16 * m;
    store_rows(tensors.out.at(place.b, place.h, q_row + first), tensors.out.row, softmax.out[m], factor[0], factor[1],
               shared.q, first, place.queries - begin - first, problem.size);
  }
}

// ---- backward ------------------------------------------------------------------------------------------

// P, dropped out but for its factor, and dS of one pair. delta is not summed as dP is, so dP - delta leaves
// rounding where P is 1, in tiles in which a query may see one key only (EDGE): there dS is 0. For P to be 1 to the
// bit, such tiles round the product of score and scale, as the forward did.
template <bool EDGE, bool DROPOUT>
__device__ __forceinline__ void slopes(float& p, float& ds, float score, float dp, float level, float delta, bool seen,
                                       bool kept, float scale, const Problem& problem) {
  p = exp2_fast(EDGE ? score * scale - level : fmaf(score, scale, -level));
  if (EDGE && !seen) p = 0;
  if (DROPOUT) dp = kept ? dp * problem.factor : 0.0f;
  ds = EDGE && p == 1 ? 0.0f : p * (dp - delta);
  if (DROPOUT && !kept) p = 0;
}

template <class T, int WIDTH, class S>
struct DqShared {
  Tile<T, S::ROWS, WIDTH> q, dout;
  Tile<T, S::COLUMNS, WIDTH> k[2], v[2];
  float delta[S::ROWS];
};

// What a warp knows of its 16 M queries.
template <int WIDTH, int M>
struct Queries {
  uint32_t q[M][WIDTH / 16][4], dout[M][WIDTH / 16][4];
  float level[M][2], delta[M][2];
  RandomRow mask[M][2];
};

// Adds what COLUMNS keys from `start` on give to dq.
template <class T, int WIDTH, class S, bool DROPOUT, bool MASKED>
__device__ __forceinline__ void gather(float (&dq)[S::M][WIDTH / 8][4], const Queries<WIDTH, S::M>& queries,
                                       Tile<T, S::COLUMNS, WIDTH>& k, Tile<T, S::COLUMNS, WIDTH>& v, int row, int start,
                                       float scale, const Place& place, const Problem& problem) {
  constexpr int M = S::M;
#pragma unroll 1  // more would spill
  for (int part = 0; part < S::COLUMNS; part += 16) {
    const int column = start + part + threadIdx.x % 4 * 2;
    float s[M][2][4], dp[M][2][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      clear(s[m]);
      clear(dp[m]);
    }
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
      uint32_t b[4];
      load_right(b, k, part, step);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(s[m][0], queries.q[m][step], b[0], b[1]);
        mma<T>(s[m][1], queries.q[m][step], b[2], b[3]);
      }
      load_right(b, v, part, step);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(dp[m][0], queries.dout[m][step], b[0], b[1]);
        mma<T>(dp[m][1], queries.dout[m][step], b[2], b[3]);
      }
    }
    uint32_t ds[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2, key = column + 8 * n + i % 2;
          const bool seen = !MASKED || key < clamp(row + 16 * m + 8 * half + place.diagonal + 1, place.keys);
          const bool kept = !DROPOUT || queries.mask[m][half].kept(key, problem.threshold);
          float p;
          slopes<MASKED, DROPOUT>(p, s[m][n][i], s[m][n][i], dp[m][n][i], queries.level[m][half],
                                  queries.delta[m][half], seen, kept, scale, problem);
        }
      as_left<T>(ds[m], s[m][0], s[m][1]);
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      uint32_t b[4];
      load_right_transposed(b, k, part, n / 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(dq[m][n], ds[m], b[0], b[1]);
        mma<T>(dq[m][n + 1], ds[m], b[2], b[3]);
      }
    }
  }
}

template <class T, int WIDTH, class S, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, S::BLOCKS)
    dq_kernel(Backward<T> tensors, Problem problem, Schedule schedule) {
  constexpr int M = S::M, COLUMNS = S::COLUMNS;
  using Shared = DqShared<T, WIDTH, S>;
  Shared& shared = shared_memory<Shared>();
  const Place place = place_of_block<true>(problem, schedule, int(blockIdx.x));
  const int begin = place.tile * S::ROWS;
  if (begin >= place.queries) return;
  const int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16 * M, row = begin + own + lane / 4;
  const int count = place.queries - begin;
  const i64 q_row = place.q_first + begin;
  const T* k = tensors.k.at(place.b, place.h, place.k_first);
  const T* v = tensors.v.at(place.b, place.h, place.k_first);
  const int end = clamp(begin + S::ROWS + place.diagonal, place.keys);
  const int whole = clamp(begin + place.diagonal + 1, place.keys) / COLUMNS * COLUMNS;
  const auto copy_keys = [&](int start, int turn) {
    copy_tile(shared.k[turn], k + start * tensors.k.row, tensors.k.row, place.keys - start, problem.size);
    copy_tile(shared.v[turn], v + start * tensors.v.row, tensors.v.row, place.keys - start, problem.size);
  };
  copy_tile(shared.q, tensors.q.at(place.b, place.h, q_row), tensors.q.row, count, problem.size);
  copy_tile(shared.dout, tensors.dout.at(place.b, place.h, q_row), tensors.dout.row, count, problem.size);
  copy_async_commit();
  if (end > 0) copy_keys(0, 0);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();

  // delta: eight lanes have a row, of which each reads 16 bytes at a time.
#pragma unroll
  for (int r = own + lane / 8; r < own + 16 * M; r += 4) {
    const T* out = tensors.out.at(place.b, place.h, q_row + r);
    float sum = 0;
#pragma unroll
    for (int chunk = lane % 8; chunk < WIDTH / 8; chunk += 8)
      if (r < count && chunk * 8 < problem.size) {
        const auto mine = load_vector<true, Vector<T, 8>>(out + chunk * 8);
        const auto other = load_vector<false, Vector<T, 8>>(shared.dout.at(r, chunk));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += to_float(mine.at[i]) * to_float(other.at[i]);
      }
    sum = quad_sum(sum);
    sum += __shfl_xor_sync(ALL, sum, 4);
    if (lane % 8 == 0) {
      shared.delta[r] = sum;
      if (r < count) tensors.delta[place.lse + begin + r] = sum;  // for dk and dv
    }
  }
  __syncwarp();
  Queries<WIDTH, M> queries;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
      load_left(queries.q[m][step], shared.q, own + 16 * m, step);
      load_left(queries.dout[m][step], shared.dout, own + 16 * m, step);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half;
      queries.level[m][half] = r < place.queries ? tensors.lse[place.lse + r] : INFINITY;
      queries.delta[m][half] = shared.delta[r - begin];
      if (DROPOUT) queries.mask[m][half] = RandomRow(*problem.seed, place.b, place.h, r);
    }
  }
  const float scale = problem.scale * LOG2_E;
  float dq[M][WIDTH / 8][4];
#pragma unroll
  for (int m = 0; m < M; ++m) clear(dq[m]);
  int turn = 0;
  for (int start = 0; start < end; start += COLUMNS, turn ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and the last one has been read
    if (start + COLUMNS < end) copy_keys(start + COLUMNS, turn ^ 1);
    copy_async_commit();
    if (start < whole)
      gather<T, WIDTH, S, DROPOUT, false>(dq, queries, shared.k[turn], shared.v[turn], row, start, scale, place, problem);
    else
      gather<T, WIDTH, S, DROPOUT, true>(dq, queries, shared.k[turn], shared.v[turn], row, start, scale, place, problem);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int first = own + 16 * m;
    store_rows(tensors.dq.at(place.b, place.h, q_row + first), tensors.dq.row, dq[m], problem.scale, problem.scale,
               shared.q, first, count - first, problem.size);
  }
}

// What dk and dv know of a query: two neighbours are read at once.
struct Known {
  float level, delta;
};

template <class T, int WIDTH, class S, bool DROPOUT>
struct DkvShared {
  Tile<T, S::ROWS, WIDTH> k, v;
  Tile<T, S::COLUMNS, WIDTH> q[2], dout[2];
  Known known[2][S::COLUMNS];
  RandomRow mask[2][DROPOUT ? S::COLUMNS : 1];
};

// Adds what COLUMNS queries from `start` on give to dk and dv. Queries past the last have P = 0 by their level.
template <class T, int WIDTH, class S, bool DROPOUT, bool MASKED>
__device__ __forceinline__ void scatter(float (&dk)[S::M][WIDTH / 8][4], float (&dv)[S::M][WIDTH / 8][4],
                                        DkvShared<T, WIDTH, S, DROPOUT>& shared, int turn, int own, int row, int start,
                                        float scale, const Place& place, const Problem& problem) {
  constexpr int M = S::M;
  const int parts = min(S::COLUMNS, place.queries - start);
#pragma unroll 1  // more would spill, as would ptxas's own unrolling where it knows the number
  for (int part = 0; part < parts; part += 16) {
    const int column = part + threadIdx.x % 4 * 2;
    float s[M][2][4], dp[M][2][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      clear(s[m]);
      clear(dp[m]);
    }
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
      uint32_t a[M][4], b[4];
#pragma unroll
      for (int m = 0; m < M; ++m) load_left(a[m], shared.k, own + 16 * m, step);
      load_right(b, shared.q[turn], part, step);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(s[m][0], a[m], b[0], b[1]);
        mma<T>(s[m][1], a[m], b[2], b[3]);
      }
#pragma unroll
      for (int m = 0; m < M; ++m) load_left(a[m], shared.v, own + 16 * m, step);
      load_right(b, shared.dout[turn], part, step);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(dp[m][0], a[m], b[0], b[1]);
        mma<T>(dp[m][1], a[m], b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const auto known = load_vector<false, Vector<float, 4>>(&shared.known[turn][column + 8 * n].level);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        RandomRow mask;
        if (DROPOUT) mask = shared.mask[turn][column + 8 * n + j];
        const int query = start + column + 8 * n + j;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + j, key = row + 16 * m + 8 * half;
            const bool kept = !DROPOUT || mask.kept(key, problem.threshold);
            float p, ds;
            slopes<MASKED, DROPOUT>(p, ds, s[m][n][i], dp[m][n][i], known.at[2 * j], known.at[2 * j + 1],
                                    key <= query + place.diagonal, kept, scale, problem);
            s[m][n][i] = p;
            dp[m][n][i] = ds;
          }
      }
    }
    uint32_t p[M][4], ds[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      as_left<T>(p[m], s[m][0], s[m][1]);
      as_left<T>(ds[m], dp[m][0], dp[m][1]);
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      uint32_t b[4];
      load_right_transposed(b, shared.dout[turn], part, n / 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(dv[m][n], p[m], b[0], b[1]);
        mma<T>(dv[m][n + 1], p[m], b[2], b[3]);
      }
      load_right_transposed(b, shared.q[turn], part, n / 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(dk[m][n], ds[m], b[0], b[1]);
        mma<T>(dk[m][n + 1], ds[m], b[2], b[3]);
      }
    }
  }
}

template <class T, int WIDTH, class S, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, S::BLOCKS)
    dkv_kernel(Backward<T> tensors, Problem problem, Schedule schedule) {
  constexpr int M = S::M, COLUMNS = S::COLUMNS;
  static_assert(COLUMNS <= THREADS, "a thread knows a query");
  using Shared = DkvShared<T, WIDTH, S, DROPOUT>;
  Shared& shared = shared_memory<Shared>();
  const Place place = place_of_block<false>(problem, schedule, int(blockIdx.x));
  const int begin = place.tile * S::ROWS;
  if (begin >= place.keys) return;
  const int own = threadIdx.x / WARP * 16 * M, row = begin + own + threadIdx.x % WARP / 4;
  const int count = place.keys - begin;
  const i64 k_row = place.k_first + begin;
  const T* q = tensors.q.at(place.b, place.h, place.q_first);
  const T* dout = tensors.dout.at(place.b, place.h, place.q_first);
  // The first query that sees any of the keys; those from `whole` on see all, and more than one.
  const int first = clamp(begin - place.diagonal, place.queries) / COLUMNS * COLUMNS;
  const int whole = place.keys == 1 ? place.queries : begin + S::ROWS - 1 - place.diagonal;

  Known known;  // of this thread's query in the next tile
  const auto copy_queries = [&](int start, int turn) {
    copy_tile(shared.q[turn], q + start * tensors.q.row, tensors.q.row, place.queries - start, problem.size);
    copy_tile(shared.dout[turn], dout + start * tensors.dout.row, tensors.dout.row, place.queries - start, problem.size);
    const int query = start + threadIdx.x;
    known = {INFINITY, 0};
    if (threadIdx.x < COLUMNS && query < place.queries)
      known = {tensors.lse[place.lse + query], tensors.delta[place.lse + query]};
  };
  const auto tell = [&](int start, int turn) {
    if (threadIdx.x < COLUMNS) {
      store_vector(&shared.known[turn][threadIdx.x].level, Vector<float, 2>{known.level, known.delta});
      if (DROPOUT)
        shared.mask[turn][threadIdx.x] = RandomRow(*problem.seed, place.b, place.h, start + threadIdx.x);
    }
  };
  copy_tile(shared.k, tensors.k.at(place.b, place.h, k_row), tensors.k.row, count, problem.size);
  copy_tile(shared.v, tensors.v.at(place.b, place.h, k_row), tensors.v.row, count, problem.size);
  if (first < place.queries) {
    copy_queries(first, 0);
    tell(first, 0);
  }
  copy_async_commit();

  const float scale = problem.scale * LOG2_E;
  float dk[M][WIDTH / 8][4], dv[M][WIDTH / 8][4];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    clear(dk[m]);
    clear(dv[m]);
  }
  int turn = 0;
  for (int start = first; start < place.queries; start += COLUMNS, turn ^= 1) {
    const int next = start + COLUMNS;
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and the last one has been read
    if (next < place.queries) copy_queries(next, turn ^ 1);
    copy_async_commit();
    if (start >= whole && next <= place.queries)
      scatter<T, WIDTH, S, DROPOUT, false>(dk, dv, shared, turn, own, row, start, scale, place, problem);
    else
      scatter<T, WIDTH, S, DROPOUT, true>(dk, dv, shared, turn, own, row, start, scale, place, problem);
    if (next < place.queries) tell(next, turn ^ 1);
  }
  copy_async_wait<0>();
  __syncthreads();  // where no query sees a key, the copies of k and v have not been waited for
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int r = own + 16 * m;
    store_rows(tensors.dk.at(place.b, place.h, k_row + r), tensors.dk.row, dk[m], problem.scale, problem.scale, shared.k,
               r, count - r, problem.size);
    store_rows(tensors.dv.at(place.b, place.h, k_row + r), tensors.dv.row, dv[m], problem.factor, problem.factor,
               shared.v, r, count - r, problem.size);
  }
}

// ---- choosing ------------------------------------------------------------------------------------------

// By benchmarks/cuda_report: the most rows a warp whose accumulators and fragments fit 255 registers, so that each
// fragment read from shared memory serves two products. Dropout takes registers for its hash.
template <int WIDTH, bool DROPOUT>
struct Shapes {
  using Forward = Shape<2, DROPOUT ? 32 : 64, 2>;
  using Dq = Shape<2, 64, 2>;
  using Dkv = Shape<2, 64, 2>;
};
template <bool DROPOUT>
struct Shapes<128, DROPOUT> {
  using Forward = Shape<1, 64, 2>;
  using Dq = Shape<1, 32, 2>;
  using Dkv = Shape<1, 32, 2>;
};

template <class V>
static bool aligned_view(const V& view) {
  const uintptr_t address = (uintptr_t)view.data;
  return aligned<bf16>(address, view.batch) && aligned<bf16>(address, view.row) && aligned<bf16>(address, view.head);
}

// body(T(), WIDTH as an integral constant, DROPOUT as another).
template <class Body>
static void with_width(int dtype, const Problem& problem, const Body& body) {
  const auto of_dtype = [&](auto kind) {
    const auto of_width = [&](auto width) {
      if (problem.seed)
        body(kind, width, std::true_type());
      else
        body(kind, width, std::false_type());
    };
    if (problem.size <= 64)
      of_width(std::integral_constant<int, 64>());
    else
      of_width(std::integral_constant<int, 128>());
  };
  if (dtype == 1)
    of_dtype(bf16());
  else
    of_dtype(f16());
}

static bool has_tensor_cores(int dtype, const Problem& problem) {
  return dtype != 0 && problem.size <= 128 && problem.size % 8 == 0;
}

static Problem problem_of(i64 lse_b, i64 lse_h, i64 lse_plane, uintptr_t q_starts, uintptr_t k_starts, uintptr_t seed,
                          i64 batch, i64 heads, i64 queries, i64 keys, i64 size, bool causal, i64 diagonal,
                          double scale, double factor, int threshold) {
  return {lse_b, lse_h, lse_plane, (const int*)q_starts, (const int*)k_starts, (const i64*)seed, int(batch), int(heads),
          int(queries), int(keys), int(size), int(diagonal), causal, float(scale), float(factor), threshold};
}

}  // namespace attention

void attention_forward(uintptr_t q, i64 q_b, i64 q_t, i64 q_h, uintptr_t k, i64 k_b, i64 k_t, i64 k_h, uintptr_t v,
                       i64 v_b, i64 v_t, i64 v_h, uintptr_t out, i64 out_b, i64 out_t, i64 out_h, uintptr_t lse,
                       i64 lse_b, i64 lse_h, i64 lse_plane, uintptr_t q_starts, uintptr_t k_starts, uintptr_t seed,
                       i64 batch, i64 heads, i64 queries, i64 keys, i64 size, bool causal, i64 diagonal, double scale,
                       double factor, int threshold, int dtype, uintptr_t stream) {
  using namespace attention;
  const Problem problem = problem_of(lse_b, lse_h, lse_plane, q_starts, k_starts, seed, batch, heads, queries, keys,
                                     size, causal, diagonal, scale, factor, threshold);
  const Forward<void> tensors{{(const void*)q, q_b, q_t, q_h},
                              {(const void*)k, k_b, k_t, k_h},
                              {(const void*)v, v_b, v_t, v_h},
                              {(void*)out, out_b, out_t, out_h},
                              (float*)lse};
  if (!has_tensor_cores(dtype, problem) || !aligned_view(tensors.q) || !aligned_view(tensors.k) ||
      !aligned_view(tensors.v) || !aligned_view(tensors.out))
    return attention::forward_fma(tensors, problem, dtype, stream);
  with_width(dtype, problem, [&](auto kind, auto width, auto dropout) {
    using T = decltype(kind);
    constexpr int WIDTH = decltype(width)::value;
    constexpr bool DROPOUT = decltype(dropout)::value;
    using S = typename Shapes<WIDTH, DROPOUT>::Forward;
    const Schedule s = schedule(queries, S::ROWS, keys, problem.size, sizeof(T));
    launch("attention_forward", forward_kernel<T, WIDTH, S, DROPOUT>, grid_of(problem, s), THREADS,
           sizeof(ForwardShared<T, WIDTH, S>), stream, typed<T>(tensors), problem, s);
  });
}

void attention_backward(uintptr_t dout, i64 dout_b, i64 dout_t, i64 dout_h, uintptr_t q, i64 q_b, i64 q_t, i64 q_h,
                        uintptr_t k, i64 k_b, i64 k_t, i64 k_h, uintptr_t v, i64 v_b, i64 v_t, i64 v_h, uintptr_t out,
                        i64 out_b, i64 out_t, i64 out_h, uintptr_t dq, i64 dq_b, i64 dq_t, i64 dq_h, uintptr_t dk,
                        i64 dk_b, i64 dk_t, i64 dk_h, uintptr_t dv, i64 dv_b, i64 dv_t, i64 dv_h, uintptr_t lse,
                        uintptr_t delta, i64 lse_b, i64 lse_h, i64 lse_plane, uintptr_t q_starts, uintptr_t k_starts,
                        uintptr_t seed, i64 batch, i64 heads, i64 queries, i64 keys, i64 size, bool causal,
                        i64 diagonal, double scale, double factor, int threshold, int dtype, uintptr_t stream) {
  using namespace attention;
  const char* op = "attention_backward";
  const Problem problem = problem_of(lse_b, lse_h, lse_plane, q_starts, k_starts, seed, batch, heads, queries, keys,
                                     size, causal, diagonal, scale, factor, threshold);
  const Backward<void> tensors{{(const void*)dout, dout_b, dout_t, dout_h},
                               {(const void*)q, q_b, q_t, q_h},
                               {(const void*)k, k_b, k_t, k_h},
                               {(const void*)v, v_b, v_t, v_h},
                               {(const void*)out, out_b, out_t, out_h},
                               {(void*)dq, dq_b, dq_t, dq_h},
                               {(void*)dk, dk_b, dk_t, dk_h},
                               {(void*)dv, dv_b, dv_t, dv_h},
                               (const float*)lse,
                               (float*)delta};
  if (!has_tensor_cores(dtype, problem) || !aligned_view(tensors.dout) || !aligned_view(tensors.q) ||
      !aligned_view(tensors.k) || !aligned_view(tensors.v) || !aligned_view(tensors.out) ||
      !aligned_view(tensors.dq) || !aligned_view(tensors.dk) || !aligned_view(tensors.dv))
    return attention::backward_fma(tensors, problem, dtype, stream);
  with_width(dtype, problem, [&](auto kind, auto width, auto dropout) {
    using T = decltype(kind);
    constexpr int WIDTH = decltype(width)::value;
    constexpr bool DROPOUT = decltype(dropout)::value;
    const Backward<T> t = typed<T>(tensors);
    using Dq = typename Shapes<WIDTH, DROPOUT>::Dq;
    const Schedule by_queries = schedule(queries, Dq::ROWS, keys, problem.size, sizeof(T));
    launch(op, dq_kernel<T, WIDTH, Dq, DROPOUT>, grid_of(problem, by_queries), THREADS,
           sizeof(DqShared<T, WIDTH, Dq>), stream, t, problem, by_queries);  // first: it writes delta
    using Dkv = typename Shapes<WIDTH, DROPOUT>::Dkv;
    const Schedule by_keys = schedule(keys, Dkv::ROWS, queries, problem.size, sizeof(T));
    launch(op, dkv_kernel<T, WIDTH, Dkv, DROPOUT>, grid_of(problem, by_keys), THREADS,
           sizeof(DkvShared<T, WIDTH, Dkv, DROPOUT>), stream, t, problem, by_keys);
  });
}

}  // namespace cuda
}  // namespace gpt2fast

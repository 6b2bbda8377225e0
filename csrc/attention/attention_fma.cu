// Attention without tensor cores: for fp32 (whose products TF32 would round), for head sizes up to 256 and for rows
// that do not start on 16 bytes. Right, not fast: products on the FMA units from shared memory, tiles loaded
// element by element and without overlap. Formulas and layout as in attention.cu; besides
//   precision  P keeps fp32. The backward takes lse with its rounding error and forms each score by the forward's
//              chain of multiply-adds, to the bit: at scores of 1e4 another order of additions would show. An eighth
//              product takes out of dq what delta's rounding does to it (see dq_fma_kernel).
//   work       256 threads have ROWS queries (forward, dq) or keys (dk, dv) of a head and walk over as many keys or
//              queries at a time. Thread (x, y) of 16 x 16 has rows y + 16 m and columns x + 16 n of the scores, and of
//              the results rows y + 16 m and four neighbours in each 64 columns. A tile of any head size is 16 KB.
#include "attention/attention_problem.h"

#include <type_traits>

namespace gpt2fast {
namespace cuda {
namespace attention {

constexpr int SIDE = 16, FMA_THREADS = SIDE * SIDE;
using Quad = Vector<float, 4>;

// A block with M x M scores a thread and room for head sizes up to 256 / M.
template <int M>
struct Fma {
  static constexpr int ROWS = SIDE * M, WIDTH = 256 / M, PARTS = WIDTH / 64;
  using Rows = Tile<float, ROWS, WIDTH>;
  using Scores = Tile<float, ROWS, ROWS < 32 ? 32 : ROWS>;
  using Result = float[M][PARTS][4];

  // Rows `from`, of which `count` are real, and zeros.
  template <class T>
  static __device__ void load(Rows& tile, const T* from, i64 stride, int count, int size) {
    for (int i = threadIdx.x; i < ROWS * WIDTH; i += FMA_THREADS) {
      const int row = i / WIDTH, column = i % WIDTH;
      const bool real = row < count && column < size;
      tile.at(row, column / 4)[column % 4] = real ? to_float(from[row * stride + column]) : 0.0f;
    }
  }

  // s[m][n] = a[row] . b[column], added up from the first to the last. (Sums of its own, here and below: what a
  // function gets by reference is memory to the emulator, which checks every access.)
  static __device__ void scores(float (&s)[M][M], Rows& a, Rows& b, int size) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    float sum[M][M] = {};
    for (int chunk = 0; chunk * 4 < size; ++chunk) {
      Quad left[M], right[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        left[m] = load_vector<false, Quad>(a.at(y + SIDE * m, chunk));
        right[m] = load_vector<false, Quad>(b.at(x + SIDE * m, chunk));
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < M; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][n] = fmaf(left[m].at[i], right[n].at[i], sum[m][n]);
    }
    memcpy(s, sum, sizeof sum);
  }

  // result += p b, where p is what the threads of a warp leave in `room`, for rows of their own.
  static __device__ void add_product(Result& result, const float (&p)[M][M], Scores& room, Rows& b) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    __syncwarp();  // the last product has been read
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < M; ++n) {
        const int column = x + SIDE * n;
        room.at(y + SIDE * m, column / 4)[column % 4] = p[m][n];
      }
    __syncwarp();
    Result sum;
    memcpy(sum, result, sizeof sum);
    for (int chunk = 0; chunk < ROWS / 4; ++chunk) {
      Quad left[M];
#pragma unroll
      for (int m = 0; m < M; ++m) left[m] = load_vector<false, Quad>(room.at(y + SIDE * m, chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const Quad right = load_vector<false, Quad>(b.at(chunk * 4 + i, part * SIDE + x));
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[m][part][j] = fmaf(left[m].at[i], right.at[j], sum[m][part][j]);
        }
    }
    memcpy(result, sum, sizeof sum);
  }

  static __device__ void clear(Result& result) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int j = 0; j < 4; ++j) result[m][part][j] = 0;
  }
  // Row m of `result` times factor.
  template <class T>
  static __device__ void store(T* to, const Result& result, int m, float factor, int size) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = (part * SIDE + threadIdx.x % SIDE) * 4 + j;
        if (column < size) to[column] = from_float<T>(result[m][part][j] * factor);
      }
  }
};

// Sum and maximum over the 16 threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int step = SIDE / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int step = SIDE / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

template <class T, int M>
__global__ void __launch_bounds__(FMA_THREADS)
    forward_fma_kernel(Forward<T> tensors, Problem problem, Schedule schedule) {
  using F = Fma<M>;
  struct Shared {
    typename F::Rows q, k, v;
    typename F::Scores p;
  };
  Shared& shared = shared_memory<Shared>();
  const Place place = place_of_block<true>(problem, schedule, int(blockIdx.x));
  const int begin = place.tile * F::ROWS;
  if (begin >= place.queries) return;
  const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
  const i64 q_row = place.q_first + begin;
  F::load(shared.q, tensors.q.at(place.b, place.h, q_row), tensors.q.row, place.queries - begin, problem.size);
  const float scale = problem.scale * LOG2_E;
  float top[M], total[M];
  RandomRow mask[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    top[m] = -INFINITY;
    total[m] = 0;
    if (problem.seed) mask[m] = RandomRow(*problem.seed, place.b, place.h, begin + y + SIDE * m);
  }
  typename F::Result out;
  F::clear(out);
  const int end = clamp(begin + F::ROWS + place.diagonal, place.keys);
  for (int start = 0; start < end; start += F::ROWS) {
    const i64 k_row = place.k_first + start;
    __syncthreads();  // the last tiles have been read
    F::load(shared.k, tensors.k.at(place.b, place.h, k_row), tensors.k.row, place.keys - start, problem.size);
    F::load(shared.v, tensors.v.at(place.b, place.h, k_row), tensors.v.row, place.keys - start, problem.size);
    __syncthreads();
    float p[M][M];
    F::scores(p, shared.q, shared.k, problem.size);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int row = begin + y + SIDE * m;
      float now = top[m];
#pragma unroll
      for (int n = 0; n < M; ++n) {
        const int column = start + x + SIDE * n;
        p[m][n] = column < place.keys && column <= row + place.diagonal ? p[m][n] * scale : -INFINITY;
        now = fmaxf(now, p[m][n]);
      }
      now = fmaxf(row_max(now), -1e38f);  // a number even where no key was seen yet
      const float rescale = exp2f(top[m] - now);
      top[m] = now;
      total[m] *= rescale;
#pragma unroll
      for (int n = 0; n < M; ++n) {
        p[m][n] = exp2f(p[m][n] - now);
        total[m] += p[m][n];
        if (problem.seed && !mask[m].kept(start + x + SIDE * n, problem.threshold)) p[m][n] = 0;
      }
#pragma unroll
      for (int part = 0; part < F::PARTS; ++part)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[m][part][j] *= rescale;
    }
    F::add_product(out, p, shared.p, shared.v);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = y + SIDE * m;
    const float sum = row_sum(total[m]);
    if (begin + row >= place.queries) continue;
    const bool none = sum == 0;
    F::store(tensors.out.at(place.b, place.h, q_row + row), out, m, none ? 0.0f : problem.factor / sum, problem.size);
    if (x == 0) {
      const float log_sum = log2f(sum), level = top[m] + log_sum;
      float* lse = tensors.lse + place.lse + begin + row;
      lse[0] = none ? INFINITY : level;
      lse[problem.lse_plane] = none ? 0.0f : top[m] - level + log_sum;
    }
  }
}

// P, before dropout, and dS of one pair. delta is not summed as dP is, so dP - delta leaves rounding where P is 1
// and the other keys weigh nothing: there dS is 0.
__device__ __forceinline__ void slopes(float& p, float& ds, float score, float dp, float level, float rest, float delta,
                                       bool seen, bool kept, const Problem& problem) {
  p = seen ? exp2f(score * (problem.scale * LOG2_E) - level - rest) : 0.0f;
  if (problem.seed) dp = kept ? dp * problem.factor : 0.0f;
  ds = p == 1 ? 0.0f : p * (dp - delta);
}

template <class T, int M>
__global__ void __launch_bounds__(FMA_THREADS)
    dq_fma_kernel(Backward<T> tensors, Problem problem, Schedule schedule) {
  using F = Fma<M>;
  struct Shared {
    typename F::Rows q, dout, k, v;
    typename F::Scores ds;
  };
  Shared& shared = shared_memory<Shared>();
  const Place place = place_of_block<true>(problem, schedule, int(blockIdx.x));
  const int begin = place.tile * F::ROWS;
  if (begin >= place.queries) return;
  const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE, count = place.queries - begin;
  const i64 q_row = place.q_first + begin;
  F::load(shared.q, tensors.q.at(place.b, place.h, q_row), tensors.q.row, count, problem.size);
  F::load(shared.dout, tensors.dout.at(place.b, place.h, q_row), tensors.dout.row, count, problem.size);
  __syncthreads();
  float level[M], rest[M], delta[M];
  RandomRow mask[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = y + SIDE * m;
    const bool real = row < count;
    const i64 place_of_row = place.lse + begin + row;
    const T* out = tensors.out.at(place.b, place.h, q_row + row);
    delta[m] = 0;
    for (int c = x; c < problem.size && real; c += SIDE) delta[m] += shared.dout.at(row, c / 4)[c % 4] * to_float(out[c]);
    delta[m] = row_sum(delta[m]);
    if (real && x == 0) tensors.delta[place_of_row] = delta[m];  // for dk and dv
    level[m] = real ? tensors.lse[place_of_row] : INFINITY;
    rest[m] = real ? tensors.lse[place_of_row + problem.lse_plane] : 0.0f;
    if (problem.seed) mask[m] = RandomRow(*problem.seed, place.b, place.h, begin + row);
  }
  // sum(dS) is 0 but for delta's rounding, which a part that all keys share would multiply: it is summed, and so is
  // the mean key P k, with which it is taken out of dq.
  typename F::Result dq, mean;
  F::clear(dq);
  F::clear(mean);
  float excess[M] = {};
  const int end = clamp(begin + F::ROWS + place.diagonal, place.keys);
  for (int start = 0; start < end; start += F::ROWS) {
    const i64 k_row = place.k_first + start;
    __syncthreads();
    F::load(shared.k, tensors.k.at(place.b, place.h, k_row), tensors.k.row, place.keys - start, problem.size);
    F::load(shared.v, tensors.v.at(place.b, place.h, k_row), tensors.v.row, place.keys - start, problem.size);
    __syncthreads();
    float score[M][M], dp[M][M];
    F::scores(score, shared.q, shared.k, problem.size);
    F::scores(dp, shared.dout, shared.v, problem.size);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < M; ++n) {
        const int row = begin + y + SIDE * m, column = start + x + SIDE * n;
        float p, ds;
        slopes(p, ds, score[m][n], dp[m][n], level[m], rest[m], delta[m],
               column < place.keys && column <= row + place.diagonal, mask[m].kept(column, problem.threshold), problem);
        score[m][n] = ds;
        dp[m][n] = p == 1 ? 0.0f : p;  // where dS is 0 the sum is no rounding
        excess[m] += ds;
      }
    F::add_product(dq, score, shared.ds, shared.k);
    F::add_product(mean, dp, shared.ds, shared.k);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = y + SIDE * m;
    const float sum = row_sum(excess[m]);
#pragma unroll
    for (int part = 0; part < F::PARTS; ++part)
#pragma unroll
      for (int j = 0; j < 4; ++j) dq[m][part][j] -= sum * mean[m][part][j];
    if (row < count)
      F::store(tensors.dq.at(place.b, place.h, q_row + row), dq, m, problem.scale, problem.size);
  }
}

template <class T, int M>
__global__ void __launch_bounds__(FMA_THREADS)
    dkv_fma_kernel(Backward<T> tensors, Problem problem, Schedule schedule) {
  using F = Fma<M>;
  struct Shared {
    typename F::Rows k, v, q, dout;
    typename F::Scores p;
  };
  Shared& shared = shared_memory<Shared>();
  const Place place = place_of_block<false>(problem, schedule, int(blockIdx.x));
  const int begin = place.tile * F::ROWS;
  if (begin >= place.keys) return;
  const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE, count = place.keys - begin;
  const i64 k_row = place.k_first + begin;
  F::load(shared.k, tensors.k.at(place.b, place.h, k_row), tensors.k.row, count, problem.size);
  F::load(shared.v, tensors.v.at(place.b, place.h, k_row), tensors.v.row, count, problem.size);
  typename F::Result dk, dv;
  F::clear(dk);
  F::clear(dv);
  const int first = clamp(begin - place.diagonal, place.queries) / F::ROWS * F::ROWS;
  for (int start = first; start < place.queries; start += F::ROWS) {
    const i64 q_row = place.q_first + start;
    __syncthreads();
    F::load(shared.q, tensors.q.at(place.b, place.h, q_row), tensors.q.row, place.queries - start, problem.size);
    F::load(shared.dout, tensors.dout.at(place.b, place.h, q_row), tensors.dout.row, place.queries - start,
            problem.size);
    __syncthreads();
    float score[M][M], dp[M][M];
    F::scores(score, shared.k, shared.q, problem.size);
    F::scores(dp, shared.v, shared.dout, problem.size);
#pragma unroll
    for (int n = 0; n < M; ++n) {
      const int column = start + x + SIDE * n;
      const bool real = column < place.queries;
      const float* lse = tensors.lse + place.lse + column;
      const float level = real ? lse[0] : INFINITY, rest = real ? lse[problem.lse_plane] : 0.0f;
      const float delta = real ? tensors.delta[place.lse + column] : 0.0f;
      RandomRow mask;
      if (problem.seed) mask = RandomRow(*problem.seed, place.b, place.h, column);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int row = begin + y + SIDE * m;
        const bool kept = mask.kept(row, problem.threshold);
        float p, ds;
        slopes(p, ds, score[m][n], dp[m][n], level, rest, delta, row <= column + place.diagonal, kept, problem);
        score[m][n] = problem.seed && !kept ? 0.0f : p;
        dp[m][n] = ds;
      }
    }
    F::add_product(dv, score, shared.p, shared.dout);
    F::add_product(dk, dp, shared.p, shared.q);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = y + SIDE * m;
    if (row >= count) continue;
    F::store(tensors.dk.at(place.b, place.h, k_row + row), dk, m, problem.scale, problem.size);
    F::store(tensors.dv.at(place.b, place.h, k_row + row), dv, m, problem.factor, problem.size);
  }
}

// body(T(), M as an integral constant) for the smallest tiles that hold the head size.
template <class Body>
static void with_tiles(int dtype, int size, const Body& body) {
  with_dtype(dtype, [&](auto kind) {
    if (size <= 64)
      body(kind, std::integral_constant<int, 4>());
    else if (size <= 128)
      body(kind, std::integral_constant<int, 2>());
    else
      body(kind, std::integral_constant<int, 1>());
  });
}

void forward_fma(const Forward<void>& tensors, const Problem& problem, int dtype, uintptr_t stream) {
  with_tiles(dtype, problem.size, [&](auto kind, auto m) {
    using T = decltype(kind);
    constexpr int M = decltype(m)::value;
    using F = Fma<M>;
    const Schedule s = schedule(problem.queries, F::ROWS, problem.keys, problem.size, sizeof(T));
    launch("attention_forward", forward_fma_kernel<T, M>, grid_of(problem, s), FMA_THREADS,
           3 * sizeof(typename F::Rows) + sizeof(typename F::Scores), stream, typed<T>(tensors), problem, s);
  });
}

void backward_fma(const Backward<void>& tensors, const Problem& problem, int dtype, uintptr_t stream) {
  const char* op = "attention_backward";
  with_tiles(dtype, problem.size, [&](auto kind, auto m) {
    using T = decltype(kind);
    constexpr int M = decltype(m)::value;
    using F = Fma<M>;
    const Backward<T> t = typed<T>(tensors);
    const size_t bytes = 4 * sizeof(typename F::Rows) + sizeof(typename F::Scores);
    const Schedule by_queries = schedule(problem.queries, F::ROWS, problem.keys, problem.size, sizeof(T));
    const Schedule by_keys = schedule(problem.keys, F::ROWS, problem.queries, problem.size, sizeof(T));
    launch(op, dq_fma_kernel<T, M>, grid_of(problem, by_queries), FMA_THREADS, bytes, stream, t, problem,
           by_queries);  // first: it writes delta
    launch(op, dkv_fma_kernel<T, M>, grid_of(problem, by_keys), FMA_THREADS, bytes, stream, t, problem,
           by_keys);
  });
}

}  // namespace attention
}  // namespace cuda
}  // namespace gpt2fast

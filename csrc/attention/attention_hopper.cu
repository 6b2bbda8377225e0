// Attention on Hopper at head size 64, bf16 and fp16: TMA brings the operands, wgmma multiplies them. One kernel
// forward and two backward.
//
//   formulas, what is saved: see attention.cu. Without dropout, batches of one length, scale > 0, and every query
//             sees a key (diagonal >= 0).
//   source    Shah et al. 2024 (FlashAttention-3): specialised warps, and the next tile's scores formed while this
//             one's products are summed. Not taken: turns of the warpgroups (ping-pong), and FP8; and backward five
//             products with dq summed by atomics, which gives other bits each time.
//   layout    (B, T, H, 64) views, strides in multiples of 16 bytes, that do not overlap; results are written the
//             same way.
//   moves     forward reads q and writes out once, dq reads q, dout, out once and dk, dv read k, v once; each reads
//             the other side once per tile of 128 rows. 256 FLOPs a visible pair forward, 896 backward (seven
//             products: S and dP are computed twice).
//   work      a block of three warpgroups owns a multiprocessor and walks over tiles of 128 queries of a head (for dk
//             and dv: of keys), the longest first, and in every second round from the other end, which evens out
//             what blocks have to do. One thread of the first warpgroup starts all copies; its warpgroup gives its
//             registers to the others, which have 64 rows of the tile each. The other side comes through a ring of
//             tiles, which runs ahead into the next round. Only tiles at the diagonal or at the end are masked;
//             those beyond it are not read.
//   forward   q for this tile and the next; k and v by turns, tiles of 128 keys. S from shared memory, 64
//             accumulators a thread; softmax; P in registers is the left operand of P v, 32 accumulators. The tensor
//             cores have P v of one tile of keys behind S of the next, whose softmax runs beside it.
//   dq        q and dout for this tile and the next; k with v, tiles of 128 keys. S and dP from shared memory, 64
//             accumulators each; dS in registers is the left operand of dS k. The tensor cores have dP, and dS k of
//             the last tile, behind S, whose exponentials run beside them. delta is formed beside the first products,
//             and written for dk and dv.
//   dk, dv    k and v become left operands in registers; q with dout, tiles of 64 queries, and their lse and delta,
//             which a second warp brings. S^T and dP^T, 32 accumulators each, become the left operands of P^T dout
//             and dS^T q, which are one tile behind as in dq.
//   shared    tiles in TMA's order (common/hopper.h). Keys and queries outside of the tensors are 0, as TMA fills
//             them; it does not store them.
//   rounds    as attention.cu: P and dS to the inputs' dtype, sums in fp32. No sum crosses warpgroups: same inputs,
//             same bits.
#include "attention/attention_cuda.h"
#include "attention/attention_problem.h"
#include "common/hopper.h"

namespace gpt2fast {
namespace cuda {
namespace attention {

constexpr int SIZE = TILE_COLUMNS, PART = 64, CONSUMERS = 2, ROWS = CONSUMERS * PART, KEYS = 128;
constexpr int STAGES = 8;  // tiles of k and of v, by turns
constexpr int HOPPER_THREADS = (1 + CONSUMERS) * WARPGROUP;

template <class T>
struct alignas(1024) HopperShared {
  T q[2][ROWS * SIZE], ring[STAGES][KEYS * SIZE], out[CONSUMERS][PART * SIZE];
  Barrier q_come[2], q_gone[2], come[STAGES], gone[STAGES];
};

struct Maps {
  TensorMap q, k, v, out;
};

#ifdef GPT2FAST_HOPPER

// A ring whose places are full after `writers` arrivals, and free when every warp of the consumers has arrived.
template <int N>
__device__ __forceinline__ void ring_init(Barrier (&come)[N], Barrier (&gone)[N], int writers = 1) {
  for (int i = 0; i < N; ++i) {
    barrier_init(come[i], writers);
    barrier_init(gone[i], CONSUMERS * WARPGROUP / WARP);
  }
}

// The tile that this block has in a round, and how many tiles of keys its queries see.
struct Work {
  Place place;
  int begin, steps;
  __device__ Work(const Problem& problem, const Schedule& schedule, int tile)
      : place(place_of_block<true>(problem, schedule, tile)),
        begin(place.tile * ROWS),
        steps((clamp(begin + ROWS + place.diagonal, place.keys) + KEYS - 1) / KEYS) {}
};
__device__ __forceinline__ int tile_of_round(int round) {
  return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// By a warp that has read, or written, what the barrier tells of.
__device__ __forceinline__ void warp_arrive(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

// Makes S of the keys that the thread's two queries do not see -infinity; `seen`: how many each sees.
__device__ __forceinline__ void hide(float (&s)[KEYS / 2], int start, const int (&seen)[2]) {
  const int column = start + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i)
    if (column + i / 4 * 8 + i % 2 >= seen[i / 2 % 2]) s[i] = -INFINITY;
}

// Accumulators, rounded, as left operands.
template <class T, int N>
__device__ __forceinline__ void as_left(uint32_t (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) a[i / 4][i % 4] = pack<T>(d[2 * i], d[2 * i + 1]);
}

// Writes a thread's part of 64 x 64 results, times a factor for each of its rows, to a tile; `own` is the first row.
template <class T>
__device__ __forceinline__ void write_rows(T* tile, const float (&d)[SIZE / 2], int own, const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < SIZE / 2; j += 2)
    *(uint32_t*)(tile + in_tile(own + j / 2 % 2 * 8, j / 4 * 8 + threadIdx.x % 4 * 2)) =
        pack<T>(d[j] * factor[j / 2 % 2], d[j + 1] * factor[j / 2 % 2]);
}

// What a thread of the forward knows of its two queries, 8 rows apart.
template <class T>
struct HopperSoftmax {
  float s[KEYS / 2];
  uint32_t p[KEYS / 16][4];
  float top[2], total[2], rescale[2];

  // Turns the products of keys from `start` on into probabilities.
  __device__ __forceinline__ void take(float scale, bool masked, int start, const int (&seen)[2]) {
    if (masked) hide(s, start, seen);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = -INFINITY;
#pragma unroll
      for (int i = 2 * half; i < KEYS / 2; i += 4) now = fmaxf(now, fmaxf(s[i], s[i + 1]));
      now = fmaxf(top[half], quad_max(now) * scale);
      rescale[half] = exp2_fast(top[half] - now);
      top[half] = now;
      total[half] *= rescale[half];
#pragma unroll
      for (int i = 2 * half; i < KEYS / 2; i += 4)
#pragma unroll
        for (int e = i; e < i + 2; ++e) {
          s[e] = exp2_fast(fmaf(s[e], scale, -now));
          total[half] += s[e];
        }
    }
  }
};

#endif

// ---- forward -------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    forward_hopper_kernel(const __grid_constant__ Maps maps, float* lse, Problem problem, Schedule schedule) {
#ifdef GPT2FAST_HOPPER
  using Shared = HopperShared<T>;
  Shared& shared = shared_memory<Shared>();
  const int tiles = schedule.tiles * problem.batch * problem.heads;
  if (threadIdx.x == 0) {
    ring_init(shared.q_come, shared.q_gone);
    ring_init(shared.come, shared.gone);
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    unsigned filled = 0;
    for (int round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      const Work work(problem, schedule, tile);
      Barrier& q_come = shared.q_come[round % 2];
      barrier_wait(shared.q_gone[round % 2], round / 2 % 2 ^ 1);
      barrier_expect(q_come, int(sizeof shared.q[0]));
      tma_load(shared.q[round % 2], maps.q, 0, work.begin, work.place.h, work.place.b, q_come);
      for (int i = 0; i < 2 * work.steps; ++i, ++filled) {
        const int stage = filled % STAGES;
        barrier_wait(shared.gone[stage], filled / STAGES % 2 ^ 1);
        barrier_expect(shared.come[stage], int(sizeof shared.ring[0]));
        tma_load(shared.ring[stage], i % 2 ? maps.v : maps.k, 0, i / 2 * KEYS, work.place.h, work.place.b,
                 shared.come[stage]);
      }
    }
  } else {
    take_registers<232>();
    const int part = threadIdx.x / WARPGROUP - 1, t = threadIdx.x % WARPGROUP, lane = t % WARP;
    const int own = t / WARP * 16 + lane / 4;  // row of the part
    const float scale = problem.scale * LOG2_E;
    unsigned used = 0;  // tiles of the ring before this round: k of step i is used + 2 i, v follows
    HopperSoftmax<T> row;
    float out[SIZE / 2];
    for (int round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      const Work work(problem, schedule, tile);
      const Place& place = work.place;
      const int first = work.begin + part * PART, last = 2 * (work.steps - 1);
      // Keys that each of the two queries sees, and those that all of the part see.
      const int seen[2] = {clamp(first + own + place.diagonal + 1, place.keys),
                           clamp(first + own + 8 + place.diagonal + 1, place.keys)};
      const int whole = clamp(first + place.diagonal + 1, place.keys);
      const auto come = [&](int i) -> const T* {
        barrier_wait(shared.come[(used + i) % STAGES], (used + i) / STAGES % 2);
        return shared.ring[(used + i) % STAGES];
      };
      const auto multiply_q = [&](const T* k) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SIZE; i += 16)
          wgmma<T, false>(row.s, wgmma_operand(shared.q[round % 2] + part * PART * SIZE + i), wgmma_operand(k + i),
                          i > 0);
        wgmma_commit();
      };
      const auto multiply_p = [&](const T* v, bool accumulate) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS; i += 16)
          wgmma<T, true>(out, row.p[i / 16], wgmma_operand(v + i * SIZE), accumulate || i > 0);
        wgmma_commit();
      };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row.top[half] = -INFINITY;
        row.total[half] = 0;
      }
      barrier_wait(shared.q_come[round % 2], round / 2 % 2);
      multiply_q(come(0));
      wgmma_wait<0>(row.s);
      warp_arrive(shared.gone[used % STAGES]);
      row.take(scale, KEYS > whole, 0, seen);
      as_left<T>(row.p, row.s);
      const T* v = come(1);
      for (int i = 2; i <= last; i += 2) {  // S of this step, P v of the last one
        multiply_q(come(i));
        multiply_p(v, i > 2);
        wgmma_wait<1>(row.s);
        warp_arrive(shared.gone[(used + i) % STAGES]);
        row.take(scale, i / 2 * KEYS + KEYS > whole, i / 2 * KEYS, seen);
        v = come(i + 1);  // here: a loop, behind which ptxas does not move the softmax
        wgmma_wait<0>(out);
        warp_arrive(shared.gone[(used + i - 1) % STAGES]);
#pragma unroll
        for (int j = 0; j < SIZE / 2; ++j) out[j] *= row.rescale[j / 2 % 2];
        as_left<T>(row.p, row.s);
      }
      warp_arrive(shared.q_gone[round % 2]);
      multiply_p(v, last > 0);
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(row.total[half]);
        const int query = first + own + 8 * half;
        factor[half] = 1 / sum;
        if (lane % 4 == 0 && query < place.queries)
          store_level(lse + place.lse + query, problem.lse_plane, row.top[half], sum);
      }
      wgmma_wait<0>(out);
      warp_arrive(shared.gone[(used + last + 1) % STAGES]);
      used += last + 2;

      if (t == 0) tma_wait_read<0>();  // the last tile has left
      named_barrier(1 + part, WARPGROUP);
      write_rows(shared.out[part], out, own, factor);
      proxy_fence();
      named_barrier(1 + part, WARPGROUP);
      if (t == 0) {
        tma_store(maps.out, shared.out[part], 0, first, place.h, place.b);
        tma_commit();
      }
    }
    if (t == 0) tma_wait_read<0>();  // shared memory ends with the block
  }
#endif
}

// ---- backward ------------------------------------------------------------------------------------------

constexpr int PAIRS = 4;                      // dq: tiles of k with those of v
constexpr int QUERIES = 64, QUERY_TILES = 8;  // dk and dv: so many at a time, of q with those of dout

template <class T>
struct alignas(1024) DqHopperShared {
  T q[2][ROWS * SIZE], dout[2][ROWS * SIZE], k[PAIRS][KEYS * SIZE], v[PAIRS][KEYS * SIZE], dq[CONSUMERS][PART * SIZE];
  Barrier q_come[2], q_gone[2], come[PAIRS], gone[PAIRS];
};
template <class T>
struct alignas(1024) DkvHopperShared {
  T k[ROWS * SIZE], v[ROWS * SIZE], q[QUERY_TILES][QUERIES * SIZE], dout[QUERY_TILES][QUERIES * SIZE];
  T dk[CONSUMERS][PART * SIZE], dv[CONSUMERS][PART * SIZE];
  float level[QUERY_TILES][QUERIES], delta[QUERY_TILES][QUERIES];
  Barrier k_come[1], k_gone[1], come[QUERY_TILES], gone[QUERY_TILES];
};

// All in tiles of PART rows.
struct BackwardMaps {
  TensorMap dout, q, k, v, dq, dk, dv;
};

#ifdef GPT2FAST_HOPPER

template <int LENGTH, class T>
__device__ __forceinline__ void load_rows(T* to, const TensorMap& map, int row, const Place& place, Barrier& barrier) {
#pragma unroll
  for (int i = 0; i < LENGTH; i += PART) tma_load(to + i * SIZE, map, 0, row + i, place.h, place.b, barrier);
}

#endif

template <class T>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    dq_hopper_kernel(const __grid_constant__ BackwardMaps maps, View<const T> outs, const float* lse, float* deltas,
                     Problem problem, Schedule schedule) {
#ifdef GPT2FAST_HOPPER
  using Shared = DqHopperShared<T>;
  Shared& shared = shared_memory<Shared>();
  const int tiles = schedule.tiles * problem.batch * problem.heads;
  if (threadIdx.x == 0) {
    ring_init(shared.q_come, shared.q_gone);
    ring_init(shared.come, shared.gone);
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    unsigned filled = 0;
    for (int round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      const Work work(problem, schedule, tile);
      Barrier& q_come = shared.q_come[round % 2];
      barrier_wait(shared.q_gone[round % 2], round / 2 % 2 ^ 1);
      barrier_expect(q_come, int(2 * sizeof shared.q[0]));
      load_rows<ROWS>(shared.q[round % 2], maps.q, work.begin, work.place, q_come);
      load_rows<ROWS>(shared.dout[round % 2], maps.dout, work.begin, work.place, q_come);
      for (int i = 0; i < work.steps; ++i, ++filled) {
        const int stage = filled % PAIRS;
        barrier_wait(shared.gone[stage], filled / PAIRS % 2 ^ 1);
        barrier_expect(shared.come[stage], int(2 * sizeof shared.k[0]));
        load_rows<KEYS>(shared.k[stage], maps.k, i * KEYS, work.place, shared.come[stage]);
        load_rows<KEYS>(shared.v[stage], maps.v, i * KEYS, work.place, shared.come[stage]);
      }
    }
  } else {
    take_registers<232>();
    const int part = threadIdx.x / WARPGROUP - 1, t = threadIdx.x % WARPGROUP, lane = t % WARP;
    const int own = t / WARP * 16 + lane / 4;  // row of the part
    const float scale = problem.scale * LOG2_E;
    unsigned used = 0;  // pairs of tiles before this round
    float s[KEYS / 2], dp[KEYS / 2], dq[SIZE / 2];
    uint32_t ds[KEYS / 16][4];
    for (int round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      const Work work(problem, schedule, tile);
      const Place& place = work.place;
      const int first = work.begin + part * PART, whole = clamp(first + place.diagonal + 1, place.keys);
      const T* const q = shared.q[round % 2] + part * PART * SIZE;
      const T* const dout = shared.dout[round % 2] + part * PART * SIZE;
      int seen[2];
      float level[2], delta[2];
      Vector<T, 8> out[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first + own + 8 * half;
        seen[half] = clamp(query + place.diagonal + 1, place.keys);
        level[half] = INFINITY;
        out[half][0] = out[half][1] = {};
        if (query >= place.queries) continue;
        level[half] = lse[place.lse + query];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          out[half][i] = load_vector<true, Vector<T, 8>>(outs.at(place.b, place.h, query) + (lane % 4 + 4 * i) * 8);
      }
      const auto come = [&](int i) {
        barrier_wait(shared.come[(used + i) % PAIRS], (used + i) / PAIRS % 2);
        return (used + i) % PAIRS;
      };
      const auto multiply = [&](int i) {  // S and dP
        const int stage = come(i);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SIZE; i += 16)
          wgmma<T, false>(s, wgmma_operand(q + i), wgmma_operand(shared.k[stage] + i), i > 0);
        wgmma_commit();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SIZE; i += 16)
          wgmma<T, false>(dp, wgmma_operand(dout + i), wgmma_operand(shared.v[stage] + i), i > 0);
        wgmma_commit();
      };
      const auto multiply_ds = [&](int step) {
        const T* const k = shared.k[(used + step) % PAIRS];
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS; i += 16)
          wgmma<T, true>(dq, ds[i / 16], wgmma_operand(k + i * SIZE), step > 0 || i > 0);
        wgmma_commit();
      };
      const auto form_p = [&](int step) {  // in the place of S
        if (step * KEYS + KEYS > whole) hide(s, step * KEYS, seen);
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -level[i / 2 % 2]));
        come(step);  // has: a loop, behind which ptxas does not move the exponentials
      };
      const auto form_ds = [&] {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) dp[i] = s[i] * (dp[i] - delta[i / 2 % 2]);
        as_left<T>(ds, dp);
      };

      barrier_wait(shared.q_come[round % 2], round / 2 % 2);
      multiply(0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own + 8 * half;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto other = load_vector<false, Vector<T, 8>>(dout + in_tile(row, (lane % 4 + 4 * i) * 8));
#pragma unroll
          for (int j = 0; j < 8; ++j) sum += to_float(out[half][i].at[j]) * to_float(other.at[j]);
        }
        delta[half] = quad_sum(sum);
        if (lane % 4 == 0 && first + row < place.queries) deltas[place.lse + first + row] = delta[half];  // for dk, dv
      }
      wgmma_wait<1>(s);
      form_p(0);
      wgmma_wait<0>(dp);
      form_ds();
      for (int i = 1; i < work.steps; ++i) {  // S and dP of this step, dS k of the last one
        multiply(i);
        multiply_ds(i - 1);
        wgmma_wait<2>(s);
        form_p(i);
        wgmma_wait<0>(dp);
        wgmma_wait<0>(dq);
        warp_arrive(shared.gone[(used + i - 1) % PAIRS]);
        form_ds();
      }
      warp_arrive(shared.q_gone[round % 2]);
      multiply_ds(work.steps - 1);
      wgmma_wait<0>(dq);
      used += work.steps;
      warp_arrive(shared.gone[(used - 1) % PAIRS]);

      // With one key P is 1 and dS is 0, of which rounding would leave something.
      const float factor[2] = {seen[0] == 1 ? 0.0f : problem.scale, seen[1] == 1 ? 0.0f : problem.scale};
      if (t == 0) tma_wait_read<0>();  // the last tile has left
      named_barrier(1 + part, WARPGROUP);
      write_rows(shared.dq[part], dq, own, factor);
      proxy_fence();
      named_barrier(1 + part, WARPGROUP);
      if (t == 0) {
        tma_store(maps.dq, shared.dq[part], 0, first, place.h, place.b);
        tma_commit();
      }
    }
    if (t == 0) tma_wait_read<0>();  // shared memory ends with the block
  }
#endif
}

#ifdef GPT2FAST_HOPPER

// The tile of keys that this block has in a round, and the tiles of queries that see it: one where none does.
struct KeyWork {
  Place place;
  int begin, first, steps;
  __device__ KeyWork(const Problem& problem, const Schedule& schedule, int tile)
      : place(place_of_block<false>(problem, schedule, tile)),
        begin(place.tile * ROWS),
        first(clamp(begin - place.diagonal, place.queries - 1) / QUERIES * QUERIES),
        steps((place.queries - first + QUERIES - 1) / QUERIES) {}
};

#endif

template <class T>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    dkv_hopper_kernel(const __grid_constant__ BackwardMaps maps, const float* lse, const float* deltas,
                      Problem problem, Schedule schedule) {
#ifdef GPT2FAST_HOPPER
  using Shared = DkvHopperShared<T>;
  Shared& shared = shared_memory<Shared>();
  const int tiles = schedule.tiles * problem.batch * problem.heads, lane = threadIdx.x % WARP;
  if (threadIdx.x == 0) {
    ring_init(shared.k_come, shared.k_gone);
    ring_init(shared.come, shared.gone, 2);
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<40>();
    const bool copies = threadIdx.x == 0;  // the second warp brings what is known of the queries
    if (!copies && threadIdx.x / WARP != 1) return;
    unsigned filled = 0;
    for (int round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      const KeyWork work(problem, schedule, tile);
      const Place& place = work.place;
      if (copies) {
        barrier_wait(shared.k_gone[0], round % 2 ^ 1);
        barrier_expect(shared.k_come[0], int(2 * sizeof shared.k));
        load_rows<ROWS>(shared.k, maps.k, work.begin, place, shared.k_come[0]);
        load_rows<ROWS>(shared.v, maps.v, work.begin, place, shared.k_come[0]);
      }
      for (int i = 0; i < work.steps; ++i, ++filled) {
        const int stage = filled % QUERY_TILES, start = work.first + i * QUERIES;
        const int free = filled / QUERY_TILES % 2 ^ 1;
        if (copies) {
          barrier_wait(shared.gone[stage], free);
          barrier_expect(shared.come[stage], int(2 * sizeof shared.q[0]));
          load_rows<QUERIES>(shared.q[stage], maps.q, start, place, shared.come[stage]);
          load_rows<QUERIES>(shared.dout[stage], maps.dout, start, place, shared.come[stage]);
        } else {
          float level[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int query = start + lane + half * WARP;
            if (query >= place.queries) continue;
            level[half] = lse[place.lse + query];
            delta[half] = deltas[place.lse + query];
          }
          barrier_wait(shared.gone[stage], free);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            shared.level[stage][lane + half * WARP] = level[half];
            shared.delta[stage][lane + half * WARP] = delta[half];
          }
          warp_arrive(shared.come[stage]);
        }
      }
    }
  } else {
    take_registers<232>();
    const int part = threadIdx.x / WARPGROUP - 1, t = threadIdx.x % WARPGROUP;
    const int own = t / WARP * 16 + lane / 4, column = lane % 4 * 2;  // row of the part
    const float scale = problem.scale * LOG2_E;
    unsigned used = 0;  // tiles of queries before this round
    float s[QUERIES / 2], dp[QUERIES / 2], dk[SIZE / 2], dv[SIZE / 2];  // S and dP transposed
    uint32_t k[SIZE / 16][4], v[SIZE / 16][4], p[QUERIES / 16][4], ds[QUERIES / 16][4];
    for (int round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      const KeyWork work(problem, schedule, tile);
      const Place& place = work.place;
      const int first = work.begin + part * PART;
      // 1 where the first tile sees keys of the other part only.
      const int skipped = work.steps > 1 && work.first + QUERIES - 1 + place.diagonal < first;
      const auto come = [&](int i) {
        barrier_wait(shared.come[(used + i) % QUERY_TILES], (used + i) / QUERY_TILES % 2);
        return (used + i) % QUERY_TILES;
      };
      const auto multiply = [&](int step) {  // S and dP
        const int stage = come(step);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SIZE; i += 16) wgmma<T, false>(s, k[i / 16], wgmma_operand(shared.q[stage] + i), i > 0);
        wgmma_commit();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SIZE; i += 16) wgmma<T, false>(dp, v[i / 16], wgmma_operand(shared.dout[stage] + i), i > 0);
        wgmma_commit();
      };
      const auto multiply_back = [&](int step) {  // P and dS
        const int stage = (used + step) % QUERY_TILES;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < QUERIES; i += 16)
          wgmma<T, true>(dv, p[i / 16], wgmma_operand(shared.dout[stage] + i * SIZE), step > skipped || i > 0);
        wgmma_commit();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < QUERIES; i += 16)
          wgmma<T, true>(dk, ds[i / 16], wgmma_operand(shared.q[stage] + i * SIZE), step > skipped || i > 0);
        wgmma_commit();
      };
      const auto form_p = [&](int step) {  // in the place of S
        const int stage = (used + step) % QUERY_TILES;
        const int before = work.first + step * QUERIES + place.diagonal - first;  // that all queries see
        if (before < PART - 1) {
          const int ahead = before + column - own;
#pragma unroll
          for (int i = 0; i < QUERIES / 2; ++i)
            if (ahead + i / 4 * 8 + i % 2 < i / 2 % 2 * 8) s[i] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < QUERIES / 2; j += 4) {
          const auto level = load_vector<false, Vector<float, 2>>(&shared.level[stage][2 * j + column]);
#pragma unroll
          for (int i = j; i < j + 4; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -level.at[i % 2]));
        }
        come(step);  // has: a loop, behind which ptxas does not move the exponentials
      };
      const auto form_ds = [&](int step) {
        const int stage = (used + step) % QUERY_TILES;
        as_left<T>(p, s);
#pragma unroll
        for (int j = 0; j < QUERIES / 2; j += 4) {
          const auto delta = load_vector<false, Vector<float, 2>>(&shared.delta[stage][2 * j + column]);
#pragma unroll
          for (int i = j; i < j + 4; ++i) dp[i] = s[i] * (dp[i] - delta.at[i % 2]);
        }
        // The query that sees the first key only: P is 1 and dS is 0, of which rounding would leave something.
        if (work.first + step + column + place.diagonal == 0) dp[0] = dp[2] = 0;
        as_left<T>(ds, dp);
      };

      barrier_wait(shared.k_come[0], round % 2);
#pragma unroll
      for (int i = 0; i < SIZE / 16; ++i) {
        const int at = in_tile(part * PART + t / WARP * 16 + lane % 16, i * 16 + lane / 16 * 8);
        ldmatrix(k[i], shared.k + at);
        ldmatrix(v[i], shared.v + at);
      }
      warp_arrive(shared.k_gone[0]);
      if (skipped) warp_arrive(shared.gone[come(0)]);
      multiply(skipped);
      wgmma_wait<1>(s);
      form_p(skipped);
      wgmma_wait<0>(dp);
      form_ds(skipped);
      for (int i = skipped + 1; i < work.steps; ++i) {  // S and dP of this step, dk and dv of the last one
        multiply(i);
        multiply_back(i - 1);
        wgmma_wait<3>(s);
        form_p(i);
        wgmma_wait<0>(dp);
        wgmma_wait<0>(dv);
        wgmma_wait<0>(dk);
        warp_arrive(shared.gone[(used + i - 1) % QUERY_TILES]);
        form_ds(i);
      }
      multiply_back(work.steps - 1);
      wgmma_wait<0>(dv);
      wgmma_wait<0>(dk);
      used += work.steps;
      warp_arrive(shared.gone[(used - 1) % QUERY_TILES]);

      const float factor = place.keys == 1 ? 0.0f : problem.scale;  // as above
      if (t == 0) tma_wait_read<0>();  // the last tile has left
      named_barrier(1 + part, WARPGROUP);
      write_rows(shared.dk[part], dk, own, {factor, factor});
      write_rows(shared.dv[part], dv, own, {1.0f, 1.0f});
      proxy_fence();
      named_barrier(1 + part, WARPGROUP);
      if (t == 0) {
        tma_store(maps.dk, shared.dk[part], 0, first, place.h, place.b);
        tma_store(maps.dv, shared.dv[part], 0, first, place.h, place.b);
        tma_commit();
      }
    }
    if (t == 0) tma_wait_read<0>();  // shared memory ends with the block
  }
#endif
}

static Problem hopper_problem(i64 batch, i64 heads, i64 queries, i64 keys, bool causal, i64 diagonal, double scale) {
  Problem problem{};
  problem.lse_plane = batch * heads * queries;
  problem.lse_batch = heads * queries;
  problem.lse_head = queries;
  problem.batch = int(batch);
  problem.heads = int(heads);
  problem.queries = int(queries);
  problem.keys = int(keys);
  problem.diagonal = int(diagonal);
  problem.causal = causal;
  problem.scale = float(scale);
  return problem;
}

// A block for each tile, or for each multiprocessor.
static dim3 persistent(const Problem& problem, const Schedule& s, i64 processors) {
  const unsigned blocks = grid_of(problem, s).x;
  return dim3(blocks < processors ? blocks : unsigned(processors));
}

}  // namespace attention

void attention_hopper_forward(uintptr_t q, i64 q_b, i64 q_t, i64 q_h, uintptr_t k, i64 k_b, i64 k_t, i64 k_h,
                              uintptr_t v, i64 v_b, i64 v_t, i64 v_h, uintptr_t out, i64 out_b, i64 out_t, i64 out_h,
                              uintptr_t lse, i64 batch, i64 heads, i64 queries, i64 keys, bool causal, i64 diagonal,
                              double scale, int dtype, i64 processors, uintptr_t stream) {
  using namespace attention;
  const char* op = "attention_hopper_forward";
  if (batch * heads * queries == 0) return;
  const Problem problem = hopper_problem(batch, heads, queries, keys, causal, diagonal, scale);
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto view = [&](uintptr_t address, i64 length, i64 b, i64 t, i64 h, int rows) {
      return tensor_map<T, 4>(op, address, {SIZE, length, heads, batch}, {t, h, b}, rows);
    };
    const Maps maps{view(q, queries, q_b, q_t, q_h, ROWS), view(k, keys, k_b, k_t, k_h, KEYS),
                    view(v, keys, v_b, v_t, v_h, KEYS), view(out, queries, out_b, out_t, out_h, PART)};
    const Schedule s = schedule(queries, ROWS, keys, SIZE, sizeof(T));
    launch(op, forward_hopper_kernel<T>, persistent(problem, s, processors), HOPPER_THREADS, sizeof(HopperShared<T>),
           stream, maps, (float*)lse, problem, s);
  });
}

void attention_hopper_backward(uintptr_t dout, i64 dout_b, i64 dout_t, i64 dout_h, uintptr_t q, i64 q_b, i64 q_t,
                               i64 q_h, uintptr_t k, i64 k_b, i64 k_t, i64 k_h, uintptr_t v, i64 v_b, i64 v_t,
                               i64 v_h, uintptr_t out, i64 out_b, i64 out_t, i64 out_h, uintptr_t dq, i64 dq_b,
                               i64 dq_t, i64 dq_h, uintptr_t dk, i64 dk_b, i64 dk_t, i64 dk_h, uintptr_t dv, i64 dv_b,
                               i64 dv_t, i64 dv_h, uintptr_t lse, uintptr_t delta, i64 batch, i64 heads, i64 queries,
                               i64 keys, bool causal, i64 diagonal, double scale, int dtype, i64 processors,
                               uintptr_t stream) {
  using namespace attention;
  const char* op = "attention_hopper_backward";
  if (batch * heads == 0) return;
  const Problem problem = hopper_problem(batch, heads, queries, keys, causal, diagonal, scale);
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto view = [&](uintptr_t address, i64 length, i64 b, i64 t, i64 h) {
      return tensor_map<T, 4>(op, address, {SIZE, length, heads, batch}, {t, h, b}, PART);
    };
    const BackwardMaps maps{view(dout, queries, dout_b, dout_t, dout_h), view(q, queries, q_b, q_t, q_h),
                            view(k, keys, k_b, k_t, k_h),                view(v, keys, v_b, v_t, v_h),
                            view(dq, queries, dq_b, dq_t, dq_h),         view(dk, keys, dk_b, dk_t, dk_h),
                            view(dv, keys, dv_b, dv_t, dv_h)};
    const Schedule by_queries = schedule(queries, ROWS, keys, SIZE, sizeof(T));
    launch(op, dq_hopper_kernel<T>, persistent(problem, by_queries, processors), HOPPER_THREADS,
           sizeof(DqHopperShared<T>), stream, maps, View<const T>{(const T*)out, out_b, out_t, out_h},
           (const float*)lse, (float*)delta, problem, by_queries);  // first: it writes delta
    const Schedule by_keys = schedule(keys, ROWS, queries, SIZE, sizeof(T));
    launch(op, dkv_hopper_kernel<T>, persistent(problem, by_keys, processors), HOPPER_THREADS,
           sizeof(DkvHopperShared<T>), stream, maps, (const float*)lse, (const float*)delta, problem, by_keys);
  });
}

}  // namespace cuda
}  // namespace gpt2fast

// Attention's forward on Hopper at head size 64, bf16 and fp16: TMA brings the operands, wgmma multiplies them.
//
//   formulas, lse: see attention.cu, whose backward this serves. Without dropout, batches of one length, scale > 0,
//             and every query sees a key (diagonal >= 0).
//   source    Shah et al. 2024 (FlashAttention-3): specialised warps, and the next tile's scores formed while this
//             one's values are summed. Not taken: turns of the warpgroups (ping-pong), and FP8.
//   layout    (B, T, H, 64) views, strides in multiples of 16 bytes, that do not overlap; out is written the same way.
//   moves     q once, out once, k and v once per tile of rows. 256 FLOPs a visible pair.
//   work      a block of three warpgroups owns a multiprocessor and walks over tiles of 128 queries of a head, the
//             longest first, and in every second round from the other end, which evens out what blocks have to do.
//             One thread of the first warpgroup starts all copies: q for this tile and the next, k and v in one ring of
//             tiles of 128 keys, which runs ahead into the next tile; its warpgroup gives its registers to the
//             others. These have 64 queries each: S from shared memory, 64 accumulators a thread; softmax; P in
//             registers is the left operand of P v, 32 accumulators. The tensor cores have P v of one tile of keys
//             behind S of the next, whose softmax runs beside it. Only tiles at the diagonal or at the end are
//             masked; those beyond the diagonal are not read.
//   shared    tiles in TMA's order (common/hopper.h). Keys and queries outside of the tensors are 0, as TMA fills
//             them; it does not store them.
//   rounds    as attention.cu: P to the inputs' dtype, sums in fp32. No sum crosses warpgroups: same inputs, same bits.
#include "attention/attention_cuda.h"
#include "attention/attention_problem.h"
#include "common/hopper.h"

namespace gpt2fast {
namespace cuda {
namespace attention {

constexpr int SIZE = TILE_COLUMNS, PART = 64, CONSUMERS = 2, ROWS = CONSUMERS * PART, KEYS = 128;
constexpr int STAGES = 8;  // tiles of k and of v, by turns
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP, HOPPER_THREADS = (1 + CONSUMERS) * WARPGROUP;

template <class T>
struct alignas(1024) HopperShared {
  T q[2][ROWS * SIZE], ring[STAGES][KEYS * SIZE], out[CONSUMERS][PART * SIZE];
  Barrier q_come[2], q_gone[2], come[STAGES], gone[STAGES];
};

struct Maps {
  TensorMap q, k, v, out;
};

#ifdef GPT2FAST_HOPPER

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

// What a thread knows of its two queries, 8 rows apart.
template <class T>
struct HopperSoftmax {
  float s[KEYS / 2];
  uint32_t p[KEYS / 16][4];
  float top[2], total[2], rescale[2];

  // Turns the products of keys from `start` on into probabilities. `seen`: how many keys each query sees.
  __device__ __forceinline__ void take(float scale, bool masked, int start, const int (&seen)[2]) {
    if (masked) {
      const int column = start + threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        if (column + i / 4 * 8 + i % 2 >= seen[i / 2 % 2]) s[i] = -INFINITY;
    }
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
          s[e] = exp2_fast(s[e] * scale - now);
          total[half] += s[e];
        }
    }
  }
  __device__ __forceinline__ void round() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
};

#endif

template <class T>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    forward_hopper_kernel(const __grid_constant__ Maps maps, float* lse, Problem problem, Schedule schedule) {
#ifdef GPT2FAST_HOPPER
  using Shared = HopperShared<T>;
  Shared& shared = shared_memory<Shared>();
  const int tiles = schedule.tiles * problem.batch * problem.heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.q_come[i], 1);
      barrier_init(shared.q_gone[i], CONSUMER_WARPS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.come[i], 1);
      barrier_init(shared.gone[i], CONSUMER_WARPS);
    }
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
    const auto arrive = [&](Barrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
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
      arrive(shared.gone[used % STAGES]);
      row.take(scale, KEYS > whole, 0, seen);
      row.round();
      const T* v = come(1);
      for (int i = 2; i <= last; i += 2) {  // S of this step, P v of the last one
        multiply_q(come(i));
        multiply_p(v, i > 2);
        wgmma_wait<1>(row.s);
        arrive(shared.gone[(used + i) % STAGES]);
        row.take(scale, i / 2 * KEYS + KEYS > whole, i / 2 * KEYS, seen);
        v = come(i + 1);  // here: a loop, behind which ptxas does not move the softmax
        wgmma_wait<0>(out);
        arrive(shared.gone[(used + i - 1) % STAGES]);
#pragma unroll
        for (int j = 0; j < SIZE / 2; ++j) out[j] *= row.rescale[j / 2 % 2];
        row.round();
      }
      arrive(shared.q_gone[round % 2]);
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
      arrive(shared.gone[(used + last + 1) % STAGES]);
      used += last + 2;

      if (t == 0) tma_wait_read<0>();  // the last tile has left
      named_barrier(1 + part, WARPGROUP);
#pragma unroll
      for (int j = 0; j < SIZE / 2; j += 2)
        *(uint32_t*)(shared.out[part] + in_tile(own + j / 2 % 2 * 8, j / 4 * 8 + lane % 4 * 2)) =
            pack<T>(out[j] * factor[j / 2 % 2], out[j + 1] * factor[j / 2 % 2]);
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

}  // namespace attention

void attention_hopper_forward(uintptr_t q, i64 q_b, i64 q_t, i64 q_h, uintptr_t k, i64 k_b, i64 k_t, i64 k_h,
                              uintptr_t v, i64 v_b, i64 v_t, i64 v_h, uintptr_t out, i64 out_b, i64 out_t, i64 out_h,
                              uintptr_t lse, i64 batch, i64 heads, i64 queries, i64 keys, bool causal, i64 diagonal,
                              double scale, int dtype, i64 processors, uintptr_t stream) {
  using namespace attention;
  const char* op = "attention_hopper_forward";
  if (batch * heads * queries == 0) return;
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
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto view = [&](uintptr_t address, i64 length, i64 b, i64 t, i64 h, int rows) {
      return tensor_map<T, 4>(op, address, {SIZE, length, heads, batch}, {t, h, b}, rows);
    };
    const Maps maps{view(q, queries, q_b, q_t, q_h, ROWS), view(k, keys, k_b, k_t, k_h, KEYS),
                    view(v, keys, v_b, v_t, v_h, KEYS), view(out, queries, out_b, out_t, out_h, PART)};
    const Schedule s = schedule(queries, ROWS, keys, SIZE, sizeof(T));
    const unsigned blocks = grid_of(problem, s).x;
    launch(op, forward_hopper_kernel<T>, dim3(blocks < processors ? blocks : unsigned(processors)), HOPPER_THREADS,
           sizeof(HopperShared<T>), stream, maps, (float*)lse, problem, s);
  });
}

}  // namespace cuda
}  // namespace gpt2fast

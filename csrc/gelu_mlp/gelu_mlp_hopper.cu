// The products of gelu_mlp.cu on Hopper: TMA brings the operands, wgmma multiplies them.
//
//   formulas, layout of inputs, bits: see gelu_mlp.cu. Sums of db see dh as it is stored, rounded to bf16 or fp16.
//   moves     forward reads a and b and writes h and activation; backward reads a, b and h and writes dh and
//             activation, and a line of H partial sums for each 64 rows. 2 R K H FLOPs.
//   work      a block of three warpgroups owns a multiprocessor and walks over tiles of 128 x 256 of the output,
//             8 rows of tiles before the next column of them, so that tiles at work at one time share their
//             operands in L2. One thread of the first warpgroup starts all copies, whose stages of 64 of K run
//             ahead of the products, into the next tile while this one is finished; its warpgroup gives its
//             registers to the others. The other two have 64 x 256 of the tile each, in 128 fp32 accumulators a
//             thread, which bias and GELU see unrounded.
//   epilogue  in four slices of 64 columns: values to shared memory, then TMA to global memory, while the next
//             slice is computed. backward: TMA has brought the tile of h, each thread puts dh where it took h,
//             and in the end every thread adds up two columns of its warpgroup's 64 rows of dh.
//   shared    tiles of 64 columns in TMA's order (common/hopper.h): no bank conflicts. Rows and columns outside of
//             the matrices are 0, as TMA fills them, and it does not store them.
#include "gelu_mlp/gelu_mlp_cuda.h"

#include "common/cuda.h"
#include "common/gelu.h"
#include "common/hopper.h"
#include "common/parameter.h"
#include "common/partial_sums.h"

namespace gpt2fast {
namespace cuda {
namespace hopper {

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = TILE_COLUMNS, GROUP = 8;
constexpr int CONSUMERS = 2, PART = ROWS / CONSUMERS, SLICES = COLUMNS / TILE_COLUMNS;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int SLICE = PART * TILE_COLUMNS;  // elements of a warpgroup's slice

// h waits in shared memory for the backward's epilogue, where the forward has one more stage.
template <class T, bool BACKWARD>
struct alignas(1024) Shared {
  static constexpr int STAGES = BACKWARD ? 3 : 4, KEPT = BACKWARD ? SLICES : 1;
  struct {
    T a[ROWS * DEPTH], b[COLUMNS * DEPTH];
  } stages[STAGES];
  T linear[CONSUMERS][KEPT][SLICE], activation[CONSUMERS][SLICE];
  Barrier come[STAGES], gone[STAGES], h_come, h_gone;
};

struct Maps {
  TensorMap a, b, h, activation, dh;  // h: written by the forward, read by the backward
};
struct Wanted {
  bool linear, activation;  // linear: h or dh
};

// The place of a tile in the output.
struct Place {
  int top, left;
  __device__ Place(int tile, int height, int width) {
    const int across = (width + COLUMNS - 1) / COLUMNS, down = (height + ROWS - 1) / ROWS;
    const int group = tile / (GROUP * across), within = tile % (GROUP * across);
    const int tall = min(down - group * GROUP, GROUP);
    top = (group * GROUP + within % tall) * ROWS;
    left = within / tall * COLUMNS;
  }
};

template <class T, bool B_TURNED, bool BACKWARD>
__global__ void __launch_bounds__(THREADS, 1)
    gelu_product_hopper_kernel(const __grid_constant__ Maps maps, Parameter bias, Wanted wanted, float* partials,
                               int height, int width, int depth) {
#ifdef GPT2FAST_HOPPER
  using Shared = hopper::Shared<T, BACKWARD>;
  constexpr int STAGES = Shared::STAGES, CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
  Shared& shared = shared_memory<Shared>();
  const int tiles = ((height + ROWS - 1) / ROWS) * ((width + COLUMNS - 1) / COLUMNS);
  const int steps = (depth + DEPTH - 1) / DEPTH;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.come[i], 1);
      barrier_init(shared.gone[i], CONSUMER_WARPS);
    }
    barrier_init(shared.h_come, 1);
    barrier_init(shared.h_gone, CONSUMER_WARPS);
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    int filled = 0, turn = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
      const Place place(tile, height, width);
      for (int step = 0; step < steps; ++step, ++filled) {
        const int stage = filled % STAGES, k = step * DEPTH;
        auto& to = shared.stages[stage];
        barrier_wait(shared.gone[stage], filled / STAGES % 2 ^ 1);
        barrier_expect(shared.come[stage], int(sizeof to));
        tma_load(to.a, maps.a, k, place.top, shared.come[stage]);
        if (B_TURNED) {
#pragma unroll
          for (int i = 0; i < SLICES; ++i)
            tma_load(to.b + i * DEPTH * TILE_COLUMNS, maps.b, place.left + i * TILE_COLUMNS, k, shared.come[stage]);
        } else {
          tma_load(to.b, maps.b, k, place.left, shared.come[stage]);
        }
        // h's place is free when the products of this tile have begun, for which they need their first stages.
        if (BACKWARD && step == min(STAGES, steps) - 1) {
          barrier_wait(shared.h_gone, turn % 2 ^ 1);
          barrier_expect(shared.h_come, int(sizeof shared.linear));
#pragma unroll
          for (int i = 0; i < CONSUMERS * SLICES; ++i)
            tma_load(shared.linear[i / SLICES][i % SLICES], maps.h, place.left + i % SLICES * TILE_COLUMNS,
                     place.top + i / SLICES * PART, shared.h_come);
        }
      }
    }
  } else {
    take_registers<232>();
    const int part = threadIdx.x / WARPGROUP - 1, t = threadIdx.x % WARPGROUP, lane = t % WARP;
    const int first_row = t / WARP * 16 + lane / 4;
    int used = 0, turn = 0;
    float sums[128];
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
      const Place place(tile, height, width);
      const int top = place.top + part * PART, left = place.left;
      for (int step = 0; step < steps; ++step, ++used) {
        const auto& from = shared.stages[used % STAGES];
        barrier_wait(shared.come[used % STAGES], used / STAGES % 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
          const uint64_t b = B_TURNED ? wgmma_operand(from.b + k * TILE_COLUMNS, DEPTH * TILE_COLUMNS * sizeof(T))
                                      : wgmma_operand(from.b + k);
          wgmma<T, B_TURNED>(sums, wgmma_operand(from.a + part * PART * DEPTH + k), b, step > 0 || k > 0);
        }
        wgmma_commit();
        if (BACKWARD && step == 0 && turn > 0) {  // the last tile's dh is stored and added up
          if (t == 0) tma_wait_read<0>();
          __syncwarp();
          if (lane == 0) barrier_arrive(shared.h_gone);
        }
        wgmma_wait<1>();
        if (step > 0 && lane == 0) barrier_arrive(shared.gone[(used - 1) % STAGES]);
      }
      wgmma_wait<0>(sums);
      if (lane == 0) barrier_arrive(shared.gone[(used - 1) % STAGES]);

      if (BACKWARD) barrier_wait(shared.h_come, turn % 2);
#pragma unroll
      for (int slice = 0; slice < SLICES; ++slice) {
        T* const linear = shared.linear[part][slice % Shared::KEPT];
        uint32_t low[8][2], high[8][2];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int column = slice * TILE_COLUMNS + j * 8 + lane % 4 * 2;
          float added[2] = {0, 0};
          if (left + column < width) load_parameter<T>(bias, left + column, 0.0f, added);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* c = sums + (slice * 8 + j) * 4 + half * 2;
            float z[2] = {c[0], c[1]}, value[2], slope[2];
            if (BACKWARD)
              unpack<T>(*(const uint32_t*)(linear + in_tile(first_row + half * 8, j * 8 + lane % 4 * 2)), z[0], z[1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) value[e] = gelu_and_slope(z[e] + added[e], slope[e]);
            low[j][half] = BACKWARD ? pack<T>(c[0] * slope[0], c[1] * slope[1]) : pack<T>(c[0], c[1]);
            high[j][half] = pack<T>(value[0], value[1]);
          }
        }
        if (t == 0) tma_wait_read<0>();  // what is written next has left for global memory
        named_barrier(1 + part, WARPGROUP);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = in_tile(first_row + half * 8, j * 8 + lane % 4 * 2);
            *(uint32_t*)(linear + at) = low[j][half];
            *(uint32_t*)(shared.activation[part] + at) = high[j][half];
          }
        proxy_fence();
        named_barrier(1 + part, WARPGROUP);
        if (t == 0) {
          const int column = left + slice * TILE_COLUMNS;
          if (wanted.linear) tma_store(BACKWARD ? maps.dh : maps.h, linear, column, top);
          if (wanted.activation) tma_store(maps.activation, shared.activation[part], column, top);
          tma_commit();
        }
      }
      const int column = left + 2 * t;
      if (BACKWARD && partials && top < height && column < width) {
        const T* dh = shared.linear[part][t / WARP];
        float total[2] = {0, 0};
        const int rows = min(height - top, PART);
#pragma unroll 8
        for (int row = 0; row < rows; ++row) {
          float pair[2];
          unpack<T>(*(const uint32_t*)(dh + in_tile(row, 2 * lane)), pair[0], pair[1]);
          total[0] += pair[0];
          total[1] += pair[1];
        }
        store_vector(partials + i64(top / PART) * width + column, Vector<float, 2>{{total[0], total[1]}});
      }
    }
    if (t == 0) tma_wait_read<0>();  // shared memory ends with the block
  }
#endif
}

template <bool BACKWARD>
static void product(const char* op, uintptr_t a, i64 a_stride, uintptr_t b, i64 b_stride, bool b_turned,
                    Parameter bias, uintptr_t h, uintptr_t activation, uintptr_t dh, uintptr_t partials, i64 rows,
                    i64 columns, i64 depth, int dtype, i64 processors, uintptr_t stream) {
  const i64 tiles = ceil_div(rows, ROWS) * ceil_div(columns, COLUMNS);
  if (tiles == 0) return;
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto output = [&](uintptr_t address) {
      return address ? tensor_map<T>(op, address, columns, rows, columns, PART) : TensorMap{};
    };
    const Maps maps{tensor_map<T>(op, a, a_stride, rows, depth, ROWS),
                    b_turned ? tensor_map<T>(op, b, b_stride, depth, columns, DEPTH)
                             : tensor_map<T>(op, b, b_stride, columns, depth, COLUMNS),
                    output(h), output(activation), output(dh)};
    const auto run = [&](auto kernel) {
      launch(op, kernel, dim3(unsigned(tiles < processors ? tiles : processors)), THREADS,
             sizeof(Shared<T, BACKWARD>), stream, maps, bias, Wanted{(BACKWARD ? dh : h) != 0, activation != 0},
             (float*)partials, int(rows), int(columns), int(depth));
    };
    if (b_turned)
      run(gelu_product_hopper_kernel<T, true, BACKWARD>);
    else
      run(gelu_product_hopper_kernel<T, false, BACKWARD>);
  });
}

}  // namespace hopper

void gelu_product_hopper_forward(uintptr_t a, i64 a_stride, uintptr_t b, i64 b_stride, bool b_turned, uintptr_t bias,
                                 bool bias_wide, uintptr_t h, uintptr_t activation, i64 rows, i64 columns, i64 depth,
                                 int dtype, i64 processors, uintptr_t stream) {
  hopper::product<false>("gelu_product_hopper_forward", a, a_stride, b, b_stride, b_turned,
                         Parameter{(const void*)bias, bias_wide}, h, activation, 0, 0, rows, columns, depth, dtype,
                         processors, stream);
}

void gelu_product_hopper_backward(uintptr_t a, i64 a_stride, uintptr_t b, i64 b_stride, bool b_turned, uintptr_t bias,
                                  bool bias_wide, uintptr_t h, uintptr_t activation, uintptr_t dh, uintptr_t dbias,
                                  uintptr_t partials, i64 rows, i64 columns, i64 depth, int dtype, i64 processors,
                                  uintptr_t stream) {
  hopper::product<true>("gelu_product_hopper_backward", a, a_stride, b, b_stride, b_turned,
                        Parameter{(const void*)bias, bias_wide}, h, activation, dh, partials, rows, columns, depth,
                        dtype, processors, stream);
  if (partials)
    sum_partials("gelu_product_hopper_backward", (const float*)partials, ceil_div(rows, hopper::PART), columns,
                 (float*)dbias, nullptr, columns, stream);
}

}  // namespace cuda
}  // namespace gpt2fast

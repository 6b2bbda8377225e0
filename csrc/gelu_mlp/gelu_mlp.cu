// The two products of GPT-2's MLP that have the GELU beside them, on the tensor cores (mma.sync; Hopper has its
// own, gelu_mlp_hopper.cu), and the sum of a matrix over its rows.
//
//   forward   h = x W^T,  activation = gelu(h + b)
//   backward  dh = (dy V) gelu'(h + b),  activation = gelu(h + b) again,  db = sum over rows of dh
//   source    Radford et al. 2019; the derivative by hand (csrc/common/gelu.h).
//   layout    a (R, K) by rows at any stride, b (K, H) by rows or by columns, as nn.Linear or GPT-2's Conv1D has
//             its weight; h, activation and dh (R, H) contiguous. bf16 or fp16, rows a multiple of 16 bytes.
//   moves     forward reads a and b and writes h and activation; backward reads a, b and h and writes dh and
//             activation, and a line of H partial sums for each 128 rows. 2 R K H FLOPs.
//   work      a block of four warps has 128 x 128 of the output, a warp 64 x 64, in fp32 accumulators that bias
//             and GELU see unrounded. Four stages of 32 of K come by asynchronous copies; while one is
//             multiplied, three are on their way. Two blocks share a multiprocessor, so that one multiplies
//             while the other is at its epilogue. There the tiles go through the stages' shared memory, so
//             that global memory sees whole lines. Blocks that run together share their operands in L2: 8
//             rows of tiles before the next column of them.
//   shared    16-byte pieces of a row are permuted by the row's number: eight rows that ldmatrix reads at once
//             lie in different banks, and so do the eight that a store of accumulators meets.
//   bits      sums over rows are added in one fixed order: the same inputs give the same bits.
#include "gelu_mlp/gelu_mlp_cuda.h"

#include "common/cuda.h"
#include "common/gelu.h"
#include "common/mma.h"
#include "common/parameter.h"
#include "common/partial_sums.h"

namespace gpt2fast {
namespace cuda {

constexpr int TILE = 128, DEPTH = 32, STAGES = 4, GROUP = 8, PRODUCT_THREADS = 128;
constexpr int PIECE = 8;  // elements of 16 bytes
constexpr int WARP_TILE = TILE / 2, ACROSS = WARP_TILE / 8, DOWN = WARP_TILE / 16;

// Where the piece of (row, column) lies in a tile of rows of COLUMNS elements.
template <int COLUMNS>
__device__ __forceinline__ int swizzled(int row, int column) {
  constexpr int PIECES = COLUMNS / PIECE;
  static_assert(PIECES == 4 || PIECES >= 8, "two rows of 64 bytes, or a row of 128 bytes or more");
  const int turn = PIECES == 4 ? row / 2 % 4 : row % 8;
  return row * COLUMNS + (column / PIECE ^ turn) * PIECE;
}

// Starts the copy of a tile (ROWS, COLUMNS) at (top, left) of a (height, width) matrix; 0 outside of it.
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void fetch(T* tile, const T* from, i64 stride, int top, int left, int height, int width) {
  constexpr int PIECES = COLUMNS / PIECE, STEP = PRODUCT_THREADS / PIECES;
  const int column = threadIdx.x % PIECES * PIECE, first = threadIdx.x / PIECES;
  const int present = min(max(width - left - column, 0), PIECE) * int(sizeof(T));
#pragma unroll
  for (int row = first; row < ROWS; row += STEP) {
    const bool inside = top + row < height && present > 0;
    copy_async(tile + swizzled<COLUMNS>(row, column), inside ? from + (top + row) * stride + left + column : from,
               inside ? present : 0);
  }
}

template <class T>
struct alignas(128) ProductShared {
  union {
    struct {
      T a[TILE * DEPTH], b[TILE * DEPTH];
    } stages[STAGES];
    T tiles[2][TILE * TILE];
  };
  float sums[2][TILE];
};

// What the epilogue has: h is written by the forward and read by the backward. Absent tensors are null.
template <class T>
struct Epilogue {
  Parameter bias;
  T *h, *activation, *dh;
  float* partials;
};

// Writes a tile of a contiguous (height, width) matrix.
template <class T>
__device__ __forceinline__ void write_tile(const T* tile, T* to, int top, int left, int height, int width) {
  constexpr int PIECES = TILE / PIECE, STEP = PRODUCT_THREADS / PIECES;
  const int column = threadIdx.x % PIECES * PIECE;
  if (left + column >= width) return;
#pragma unroll 4
  for (int row = threadIdx.x / PIECES; row < TILE; row += STEP)
    if (top + row < height)
      store_vector(to + i64(top + row) * width + left + column,
                   load_vector<false, Vector<T, PIECE>>(tile + swizzled<TILE>(row, column)));
}

template <class T, bool B_TURNED, bool BACKWARD>
__global__ void __launch_bounds__(PRODUCT_THREADS, 2)
    gelu_product_kernel(const T* a, i64 a_stride, const T* b, i64 b_stride, Epilogue<T> out, int height, int width,
                        int depth) {
  ProductShared<T>& shared = shared_memory<ProductShared<T>>();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_top = warp / 2 * WARP_TILE, warp_left = warp % 2 * WARP_TILE;
  const int across = (width + TILE - 1) / TILE, down = (height + TILE - 1) / TILE;
  const int group = int(blockIdx.x) / (GROUP * across), within = int(blockIdx.x) % (GROUP * across);
  const int tall = min(down - group * GROUP, GROUP);
  const int line = group * GROUP + within % tall, top = line * TILE, left = within / tall * TILE;

  const auto stage = [&](int number) {
    const int k = number * DEPTH;
    if (k < depth) {
      auto& to = shared.stages[number % STAGES];
      fetch<TILE, DEPTH>(to.a, a, a_stride, top, k, height, depth);
      if (B_TURNED)
        fetch<DEPTH, TILE>(to.b, b, b_stride, k, left, depth, width);
      else
        fetch<TILE, DEPTH>(to.b, b, b_stride, left, k, width, depth);
    }
    copy_async_commit();
  };

  float sums[DOWN][ACROSS][4];
#pragma unroll
  for (int i = 0; i < DOWN; ++i)
#pragma unroll
    for (int j = 0; j < ACROSS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) stage(i);
  const int steps = (depth + DEPTH - 1) / DEPTH;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // all have seen this stage come, and all have left the one that is filled next
    stage(step + STAGES - 1);
    const auto& from = shared.stages[step % STAGES];
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t x[DOWN][4], y[ACROSS / 2][4];
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
        ldmatrix(x[i], from.a + swizzled<DEPTH>(warp_top + i * 16 + lane % 16, k + lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < ACROSS / 2; ++j) {
        const int column = warp_left + j * 16;
        if (B_TURNED)
          ldmatrix_transposed(y[j], from.b + swizzled<TILE>(k + lane % 16, column + lane / 16 * 8));
        else
          ldmatrix(y[j], from.b + swizzled<DEPTH>(column + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
      }
#pragma unroll
      for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) mma<T>(sums[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
    }
  }

  T *first = shared.tiles[0], *second = shared.tiles[1];
  copy_async_wait<0>();
  __syncthreads();  // the stages are free
  if (BACKWARD) {
    fetch<TILE, TILE>(first, (const T*)out.h, width, top, left, height, width);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < ACROSS; ++j) {
    const int column = warp_left + j * 8 + lane % 4 * 2;
    float bias[2] = {0, 0}, total[2] = {0, 0};
    if (left + column < width) load_parameter<T>(out.bias, left + column, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = swizzled<TILE>(warp_top + i * 16 + lane / 4 + half * 8, column) + column % PIECE;
        uint32_t& low = *reinterpret_cast<uint32_t*>(first + place);
        uint32_t& high = *reinterpret_cast<uint32_t*>(second + place);
        float* c = sums[i][j] + 2 * half;
        float z[2], value[2], slope[2];
        if (BACKWARD) {
          unpack<T>(low, z[0], z[1]);
        } else {
          low = pack<T>(c[0], c[1]);
          z[0] = c[0];
          z[1] = c[1];
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          value[e] = gelu_and_slope(z[e] + bias[e], slope[e]);
          if (BACKWARD) total[e] += c[e] *= slope[e];
        }
        if (BACKWARD) low = pack<T>(c[0], c[1]);
        high = pack<T>(value[0], value[1]);
      }
    if (BACKWARD) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < WARP; step *= 2) total[e] += __shfl_xor_sync(ALL, total[e], step);
        if (lane < 4) shared.sums[warp / 2][column + e] = total[e];
      }
    }
  }
  __syncthreads();
  T* const linear = BACKWARD ? out.dh : out.h;
  if (linear) write_tile(first, linear, top, left, height, width);
  if (out.activation) write_tile(second, out.activation, top, left, height, width);
  const int column = left + threadIdx.x;
  if (BACKWARD && out.partials && column < width)
    out.partials[i64(line) * width + column] = shared.sums[0][threadIdx.x] + shared.sums[1][threadIdx.x];
}

template <bool BACKWARD>
static void gelu_product(const char* op, uintptr_t a, i64 a_stride, uintptr_t b, i64 b_stride, bool b_turned,
                         Parameter bias, uintptr_t h, uintptr_t activation, uintptr_t dh, uintptr_t partials, i64 rows,
                         i64 columns, i64 depth, int dtype, uintptr_t stream) {
  const unsigned tiles = unsigned(ceil_div(rows, TILE) * ceil_div(columns, TILE));
  with_half_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto run = [&](auto kernel) {
      launch(op, kernel, dim3(tiles), PRODUCT_THREADS, sizeof(ProductShared<T>), stream, (const T*)a, a_stride,
             (const T*)b, b_stride, Epilogue<T>{bias, (T*)h, (T*)activation, (T*)dh, (float*)partials}, int(rows),
             int(columns), int(depth));
    };
    if (b_turned)
      run(gelu_product_kernel<T, true, BACKWARD>);
    else
      run(gelu_product_kernel<T, false, BACKWARD>);
  });
}

void gelu_product_forward(uintptr_t a, i64 a_stride, uintptr_t b, i64 b_stride, bool b_turned, uintptr_t bias,
                          bool bias_wide, uintptr_t h, uintptr_t activation, i64 rows, i64 columns, i64 depth,
                          int dtype, uintptr_t stream) {
  gelu_product<false>("gelu_product_forward", a, a_stride, b, b_stride, b_turned,
                      Parameter{(const void*)bias, bias_wide}, h, activation, 0, 0, rows, columns, depth, dtype,
                      stream);
}

void gelu_product_backward(uintptr_t a, i64 a_stride, uintptr_t b, i64 b_stride, bool b_turned, uintptr_t bias,
                           bool bias_wide, uintptr_t h, uintptr_t activation, uintptr_t dh, uintptr_t dbias,
                           uintptr_t partials, i64 rows, i64 columns, i64 depth, int dtype, uintptr_t stream) {
  gelu_product<true>("gelu_product_backward", a, a_stride, b, b_stride, b_turned,
                     Parameter{(const void*)bias, bias_wide}, h, activation, dh, partials, rows, columns, depth, dtype,
                     stream);
  if (partials)
    sum_partials("gelu_product_backward", (const float*)partials, ceil_div(rows, TILE), columns, (float*)dbias,
                 nullptr, columns, stream);
}

// ---- a bias's gradient ---------------------------------------------------------------------------------

constexpr int SUM_THREADS = 128, SUM_ROWS = 4;  // rows at a time

template <class T, int V>
__global__ void __launch_bounds__(SUM_THREADS)
    column_sum_kernel(const T* x, i64 x_stride, float* partials, i64 rows, i64 columns) {
  const i64 c = (i64(blockIdx.y) * SUM_THREADS + threadIdx.x) * V;
  if (c >= columns) return;
  float sum[V] = {};
  for (i64 row = i64(blockIdx.x) * SUM_ROWS; row < rows; row += i64(gridDim.x) * SUM_ROWS) {
    Vector<T, V> in[SUM_ROWS];
#pragma unroll
    for (int i = 0; i < SUM_ROWS; ++i)
      if (row + i < rows) in[i] = load_vector<true, Vector<T, V>>(x + (row + i) * x_stride + c);
#pragma unroll
    for (int i = 0; i < SUM_ROWS; ++i) {
      if (row + i >= rows) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += to_float(in[i].at[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) partials[i64(blockIdx.x) * columns + c + j] = sum[j];
}

void column_sum(uintptr_t x, i64 x_stride, uintptr_t sum, uintptr_t partials, i64 strips, i64 rows, i64 columns,
                int dtype, uintptr_t stream) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto run = [&](auto kernel, int width) {
      launch("column_sum", kernel, dim3(unsigned(strips), unsigned(ceil_div(columns, i64(width) * SUM_THREADS))),
             SUM_THREADS, 0, stream, (const T*)x, x_stride, (float*)partials, rows, columns);
    };
    if (aligned<T>(x, x_stride) && columns % WIDE<T> == 0)
      run(column_sum_kernel<T, WIDE<T>>, WIDE<T>);
    else
      run(column_sum_kernel<T, 1>, 1);
  });
  sum_partials("column_sum", (const float*)partials, strips, columns, (float*)sum, nullptr, columns, stream);
}

}  // namespace cuda
}  // namespace gpt2fast

// The sum over rows that is the gradient of a bias.
//
//   computes  sum[c] = sum over rows r of x[r][c], in fp32
//   layout    rows of `columns` contiguous elements, any row stride.
//   moves     1 element per entry.
//   work      rows are shared out among threads; four rows are summed in registers, added to a row of fp32
//             partials per thread, which is flushed every FLUSH rows; threads are added in their order.
#include "common/simd.h"

#include "linear/linear_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 SUM_GRAIN = 8192;  // elements below which a second thread costs more than it brings
constexpr i64 SUM_ROWS = 4;
static_assert(FLUSH % SUM_ROWS == 0, "a flush falls on a row block's end");

template <class T>
static void sum_rows(const T* x, i64 x_stride, float* partial, float* recent, i64 begin, i64 end, i64 columns) {
  const auto flush = [&] {
    for_columns(columns, [&](i64 c, i64 n) {
      store_at(partial + c, load_at(partial + c, n) + load_at(recent + c, n), n);
      store_at(recent + c, vf{}, n);
    });
  };
  for (i64 c = 0; c < columns; ++c) partial[c] = recent[c] = 0.0f;
  i64 r = begin;
  for (; r + SUM_ROWS <= end; r += SUM_ROWS) {
    const T* row = x + r * x_stride;
    for_columns(columns, [&](i64 c, i64 n) {
      const vf first = load_at(row + c, n) + load_at(row + x_stride + c, n);
      const vf second = load_at(row + 2 * x_stride + c, n) + load_at(row + 3 * x_stride + c, n);
      store_at(recent + c, load_at(recent + c, n) + (first + second), n);
    });
    if ((r + SUM_ROWS - begin) % FLUSH == 0) flush();
  }
  for (; r < end; ++r)
    for_columns(columns, [&](i64 c, i64 n) {
      store_at(recent + c, load_at(recent + c, n) + load_at(x + r * x_stride + c, n), n);
    });
  flush();
}

// workspace: threads * 2 * columns floats.
void column_sum(uintptr_t x, i64 x_stride, uintptr_t sum, uintptr_t workspace, i64 rows, i64 columns, int dtype,
                int threads) {
  const i64 grain = (SUM_GRAIN + columns - 1) / columns;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_shares(rows, grain, threads, [&](int share, i64 begin, i64 end) {
      float* partial = (float*)workspace + share * 2 * columns;
      sum_rows((const T*)x, x_stride, partial, partial + columns, begin, end, columns);
    });
  });
  const int used = share_count(rows, grain, threads);
  for_columns(columns, [&](i64 c, i64 n) {
    vf total = {};
    for (int t = 0; t < used; ++t) total += load_at((const float*)workspace + t * 2 * columns + c, n);
    store_at((float*)sum + c, total, n);
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

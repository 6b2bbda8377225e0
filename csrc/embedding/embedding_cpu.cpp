// Token and position embedding, and its backward into dense gradients.
//
//   forward   out[b, t] = wte[idx[b, t]] + wpe[t]   (wpe starts at the first position wanted)
//   backward  dwte[v] = sum of dy[b, t] over idx[b, t] = v,  dwpe[t] = sum of dy[b, t] over b
//   source    the derivative of the sum above.
//   layout    idx contiguous (batch, length) int64; table rows and dy rows at any row stride; out contiguous.
//   moves     forward 3 elements per entry; backward 3 (dy twice, dwte) and dwpe. Rows of dwte that no token
//             names are not touched: the caller gives zeros, best as pages that the system has not yet filled.
//   work      forward: indices are checked, then tokens are shared out among threads; rows of wte lie anywhere,
//             so that they are fetched AHEAD tokens before they are read.
//             backward: columns are shared out, so that every thread has the same work whatever the tokens are,
//             two never write one element, and the result does not depend on their number. Tokens of equal
//             index are linked in order; their rows are summed in fp32, a level for every FLUSH rows, and the
//             sum is rounded once.
//   saves     idx.
#include "common/simd.h"
#include "embedding/embedding_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 AHEAD = 4;

// Returns the first place in idx that holds no row of wte, and then writes nothing; else -1.
i64 embedding_forward(uintptr_t idx, uintptr_t wte, i64 wte_stride, uintptr_t wpe, i64 wpe_stride, uintptr_t out,
                      i64 batch, i64 length, i64 columns, i64 vocabulary, int dtype, int threads) {
  const i64* tokens = (const i64*)idx;
  for (i64 i = 0; i < batch * length; ++i)
    if (tokens[i] < 0 || tokens[i] >= vocabulary) return i;
  const i64 grain = (4096 + columns - 1) / columns;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto row_of = [&](i64 i) { return (const T*)wte + tokens[i] * wte_stride; };
    parallel_shares(batch * length, grain, threads, [&](int, i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i) {
        const T *row = row_of(i), *place = (const T*)wpe + i % length * wpe_stride;
        const T* next = row_of(i + AHEAD < end ? i + AHEAD : end - 1);
        T* target = (T*)out + i * columns;
        for_columns(columns, [&](i64 c, i64 n) {
          __builtin_prefetch(next + c);
          store_at(target + c, load_at(row + c, n) + load_at(place + c, n), n);
        });
      }
    });
  });
  return -1;
}

// The fp32 sum of rows given in order, on the columns [begin, end): `recent` holds up to FLUSH rows, `total` the
// rows before them.
template <class T>
struct RowSum {
  float *recent, *total;
  i64 begin, end, count;

  void add(const T* row) {
    if (count && count % FLUSH == 0) {
      const bool first = count == FLUSH;
      each([&](i64 c, i64 n) {
        const vf before = first ? vf{} : load_at(total + c, n);
        store_at(total + c, before + load_at(recent + c, n), n);
      });
    }
    if (count++ % FLUSH == 0)
      each([&](i64 c, i64 n) { store_at(recent + c, load_at(row + c, n), n); });
    else
      each([&](i64 c, i64 n) { store_at(recent + c, load_at(recent + c, n) + load_at(row + c, n), n); });
  }
  void finish(T* out) {
    const bool one_level = count <= FLUSH;
    each([&](i64 c, i64 n) {
      vf sum = load_at(recent + c, n);
      if (!one_level) sum += load_at(total + c, n);
      store_at(out + c, sum, n);
    });
    count = 0;
  }
  template <class Body>
  void each(const Body& body) const {
    for_columns(end - begin, [&](i64 c, i64 n) { body(begin + c, n); });
  }
};

// links: vocabulary + batch * length integers where dwte is wanted; workspace: 2 * columns floats. dwte must be
// zero where it is not to be added to; dwpe points at the first position's row. Either may be 0.
void embedding_backward(uintptr_t idx, uintptr_t dy, i64 dy_stride, uintptr_t dwte, uintptr_t dwpe, uintptr_t links,
                        uintptr_t workspace, i64 batch, i64 length, i64 columns, i64 vocabulary,
                        int dtype, int threads) {
  const i64 count = batch * length;
  const i64* tokens = (const i64*)idx;
  i64 *first = (i64*)links, *next = first + vocabulary;
  if (dwte) {
    for (i64 v = 0; v < vocabulary; ++v) first[v] = -1;
    for (i64 i = count; i-- > 0;) {
      next[i] = first[tokens[i]];
      first[tokens[i]] = i;
    }
  }
  // Shares of at least 64 columns and 8192 elements.
  const i64 grain = count >= 128 ? 64 : 64 * (128 / (count > 0 ? count : 1));
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const T* rows = (const T*)dy;
    parallel_shares(columns, grain, threads, [&](int, i64 begin, i64 end) {
      RowSum<T> sum{(float*)workspace, (float*)workspace + columns, begin, end, 0};
      if (dwte)
        for (i64 i = 0; i < count; ++i) {
          if (first[tokens[i]] != i) continue;
          for (i64 j = i; j >= 0; j = next[j]) sum.add(rows + j * dy_stride);
          sum.finish((T*)dwte + tokens[i] * columns);
        }
      if (dwpe && batch)
        for (i64 t = 0; t < length; ++t) {
          for (i64 b = 0; b < batch; ++b) sum.add(rows + (b * length + t) * dy_stride);
          sum.finish((T*)dwpe + t * columns);
        }
    });
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Attention of one query: out = softmax(q K^T / sqrt(D)) V over `count` keys, K and V (count, D) contiguous.
//
//   moves     K and V once: at one query that is the time, so nothing is packed or transposed but the sums of VL keys.
//   work      two passes: scores of VL keys at once, then their exponentials times the values, in sums of FLUSH keys.
//             A head's keys and its values are short streams, which the CPU sees too late: while keys are read, the
//             first of the values are fetched.
#pragma once
#include "common/tile.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 RUN = 32;  // columns whose products are summed before they meet the rest: long sums round more

// Lane k is q . key k, for k < n <= VL; the others are 0.
GPT2FAST_INLINE vf dot_keys(const float* q, const float* keys, i64 n, i64 size) {
  vf found = {};
  for (i64 first = 0; first < size; first += RUN) {
    vf sum[VL] = {};
    for_columns(smaller(RUN, size - first), [&](i64 c, i64 lanes) {
      const i64 d = first + c;
      const vf x = load_at(q + d, lanes);
      if (n == VL) {
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k) sum[k] += x * load_at(keys + k * size + d, lanes);
      } else {
        for (i64 k = 0; k < n; ++k) sum[k] += x * load_at(keys + k * size + d, lanes);
      }
    });
    found += lane_sums(sum);
  }
  return found;
}

// out[c] = factor * sum over k of p[k] values[k][c], for the VECTORS vectors of columns from c on.
template <int VECTORS>
GPT2FAST_INLINE void mix_values(const float* p, const float* values, i64 count, i64 size, float factor, float* out,
                                i64 lanes) {
  vf total[VECTORS] = {};
  for (i64 first = 0; first < count; first += FLUSH) {
    const i64 end = smaller(first + FLUSH, count);
    vf even[VECTORS] = {}, odd[VECTORS] = {};  // two, since one addition waits for the last
    i64 k = first;
    for (; k + 2 <= end; k += 2)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        even[v] += p[k] * load_at(values + k * size + v * VL, lanes);
        odd[v] += p[k + 1] * load_at(values + (k + 1) * size + v * VL, lanes);
      }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      if (k < end) even[v] += p[k] * load_at(values + k * size + v * VL, lanes);
      total[v] += even[v] + odd[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) store_at(out + v * VL, total[v] * factor, lanes);
}

// `space` holds the scores: count floats, rounded up to VL.
static void attend_one(const float* q, const float* keys, const float* values, i64 count, i64 size, float* space,
                       float* out) {
  const float scale = 1.0f / __builtin_sqrtf(float(size));
  vf most = splat(-__builtin_inff());
  for (i64 k = 0; k < count; k += VL) {
    const i64 n = smaller(VL, count - k);
    for (i64 c = k * size; c < smaller(k + n, FLUSH) * size; c += 16) __builtin_prefetch(values + c);
    vf score = dot_keys(q, keys + k * size, n, size) * scale;
    for (i64 i = n; i < VL; ++i) score[i] = -__builtin_inff();
    most = vmax(score, most);
    store(space + k, score);
  }
  const vf largest = splat(hmax(most));
  vf sum = {};
  for (i64 k = 0; k < count; k += VL) {
    const vf p = vexp(load(space + k) - largest);
    sum += p;
    store(space + k, p);
  }
  const float factor = 1.0f / hsum(sum);
  i64 c = 0;
  for (; c + 4 * VL <= size; c += 4 * VL) mix_values<4>(space, values + c, count, size, factor, out + c, VL);
  for (; c < size; c += VL) mix_values<1>(space, values + c, count, size, factor, out + c, smaller(VL, size - c));
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

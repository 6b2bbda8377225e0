// Random words as a hash of (seed, b, h, i, j), those of gpt2fast/ops/random.py. Dropout keeps element (i, j) of head
// (b, h) where the first 24 bits are >= probability * 2^24.
#pragma once
#include "common/simd.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

struct Dropout {
  uint32_t first, second;  // of the head
  int32_t threshold;
  float keep;  // 1 / (1 - dropout), 0 where everything is dropped
};
GPT2FAST_INLINE uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
static Dropout head_dropout(double probability, i64 seed, i64 b, i64 h) {
  const uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
  const uint32_t start = scramble(low + 0x9e3779b9u) ^ high;
  Dropout d;
  d.first = scramble(scramble(scramble(start) + uint32_t(b)) + uint32_t(h));
  d.second = scramble(scramble(scramble(start ^ 0x85ebca6bu) + uint32_t(b)) + uint32_t(h));
  d.threshold = int32_t(probability * 16777216.0 + 0.5);
  d.keep = probability < 1.0 ? float(1.0 / (1.0 - probability)) : 0.0f;
  return d;
}
GPT2FAST_INLINE vi lane_index() {
  alignas(64) static const int32_t index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vi x;
  __builtin_memcpy(&x, index, sizeof x);
  return x;
}
struct RandomRow {
  uint32_t first, second;
  int32_t threshold;
  RandomRow(const Dropout& d, i64 i)
      : first(scramble(d.first ^ uint32_t(i))),
        second(scramble(d.second + uint32_t(i) * 0x9e3779b9u)),
        threshold(d.threshold) {}
  RandomRow(i64 seed, i64 b, i64 h, i64 i) : RandomRow(head_dropout(0.0, seed, b, h), i) {}  // for its words
  vu words(i64 j) const {  // of keys j, j + 1, ...
    vu x = ((vu)lane_index() + uint32_t(j)) * 0x9e3779b9u + first;
    x = ((x ^ (x >> 16)) * 0x7feb352du) ^ second;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
  vi keep(i64 j) const { return (vi)((vi)(words(j) >> 8) >= threshold); }
};

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

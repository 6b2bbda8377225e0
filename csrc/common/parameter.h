// Weights and biases beside half-precision data, which may be fp32.
#pragma once
#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

// A weight or bias: fp32 beside any T, or T.
struct Parameter {
  const void* data;
  bool wide;
};

template <class T, int V>
__device__ __forceinline__ void load_parameter(const Parameter& p, i64 column, float absent, float (&out)[V]) {
  if (!p.data) {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = absent;
  } else if (p.wide) {
    constexpr int PART = V < 4 ? V : 4;
#pragma unroll
    for (int j = 0; j < V; j += PART) {
      const auto v = load_vector<false, Vector<float, PART>>((const float*)p.data + column + j);
#pragma unroll
      for (int k = 0; k < PART; ++k) out[j + k] = v.at[k];
    }
  } else {
    const auto v = load_vector<false, Vector<T, V>>((const T*)p.data + column);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = to_float(v.at[j]);
  }
}

}  // namespace cuda
}  // namespace gpt2fast

// The tanh-GELU of one number: z s, s = sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)) (csrc/gelu/gelu.cu).
#pragma once
#include "common/cuda.h"

namespace gpt2fast {
namespace cuda {

// Value and slope; what the caller does not use is not computed. Below -10 the GELU is 0 but for 1e-37, above
// 16 it is z: infinities must not meet factors of 0, NaN stays, and e and s stay within fp32's range.
__device__ __forceinline__ float gelu_and_slope(float z, float& slope) {
  z = z < -10.0f ? -10.0f : z;
  const float low = z > 16.0f ? 16.0f : z, square = low * low;
  const float e = exp2_fast(low * fmaf(-0.1029432395800235f, square, -2.302208198144325f));  // -2 u / ln 2
  const float s = reciprocal(1 + e);
  slope = fmaf(s * (low * (e * s)), fmaf(0.21406444881780073f, square, 1.5957691216057308f), s);  // 1 - s = e s
  return z * s;
}

}  // namespace cuda
}  // namespace gpt2fast

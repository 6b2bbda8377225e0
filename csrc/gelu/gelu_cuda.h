// CUDA GELU: pointers, sizes and strides (in elements) as integers; see gelu.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// A bias is fp32 where bias_wide says so, else of x's dtype. Absent tensors are 0. y may be x.
void gelu_forward(uintptr_t x, int64_t x_stride, uintptr_t bias, bool bias_wide, uintptr_t y, int64_t rows,
                  int64_t columns, int dtype, uintptr_t stream);
// dx may be dy; activation: gelu(x + bias) where wanted; partials: (strips, columns) where dbias is wanted.
void gelu_backward(uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, uintptr_t bias, bool bias_wide,
                   uintptr_t dx, uintptr_t activation, uintptr_t dbias, uintptr_t partials, int64_t strips,
                   int64_t rows, int64_t columns, int dtype, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

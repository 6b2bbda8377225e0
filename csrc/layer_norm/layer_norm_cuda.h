// CUDA layer norm: pointers, sizes and strides (in elements) as integers; see layer_norm.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// dtype: 0 fp32, 1 bf16, 2 fp16, of everything but fp32 statistics and gradients of parameters; a weight or
// bias is fp32 where its `wide` says so. Absent tensors are 0.
void layer_norm_forward(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
                        uintptr_t weight, bool weight_wide, uintptr_t bias, bool bias_wide, uintptr_t total,
                        uintptr_t y, uintptr_t statistics, uintptr_t seed, int64_t rows, int64_t columns,
                        double eps, double factor, int threshold, int dtype, uintptr_t stream);
// partials: (blocks, 2 columns), 0 with dweight and dbias where these are not wanted.
void layer_norm_backward(uintptr_t dy, int64_t dy_stride, uintptr_t dsum, int64_t dsum_stride, uintptr_t x,
                         int64_t x_stride, uintptr_t weight, bool weight_wide, uintptr_t statistics,
                         uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t partials, int64_t blocks,
                         int64_t rows, int64_t columns, int dtype, uintptr_t stream);
void dropout_rows(uintptr_t x, int64_t x_stride, uintptr_t out, uintptr_t seed, int64_t rows, int64_t columns,
                  double factor, int threshold, int dtype, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

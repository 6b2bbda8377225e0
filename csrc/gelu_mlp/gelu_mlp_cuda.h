// CUDA GELU-MLP: pointers, sizes and strides (in elements) as integers; see gelu_mlp.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// h = a b and activation = gelu(h + bias), (rows, columns) contiguous, of a (rows, depth) and b, which is stored
// (depth, columns) where b_turned, else (columns, depth). bf16 or fp16. A bias is fp32 where bias_wide says so,
// else of a's dtype. Absent tensors are 0. Addresses and rows are multiples of 16 bytes.
void gelu_product_forward(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride, bool b_turned, uintptr_t bias,
                          bool bias_wide, uintptr_t h, uintptr_t activation, int64_t rows, int64_t columns,
                          int64_t depth, int dtype, uintptr_t stream);
// dh = (a b) gelu'(h + bias), activation = gelu(h + bias), dbias = the sum of dh over the rows; partials:
// (rows / 128 rounded up, columns) where dbias is wanted.
void gelu_product_backward(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride, bool b_turned, uintptr_t bias,
                           bool bias_wide, uintptr_t h, uintptr_t activation, uintptr_t dh, uintptr_t dbias,
                           uintptr_t partials, int64_t rows, int64_t columns, int64_t depth, int dtype,
                           uintptr_t stream);
// The same by wgmma and TMA, in at most `processors` blocks, for GPUs of compute capability 9.0 that have sm_90a's
// code; partials: (rows / 64 rounded up, columns). Strides are at least as long as rows.
void gelu_product_hopper_forward(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride, bool b_turned,
                                 uintptr_t bias, bool bias_wide, uintptr_t h, uintptr_t activation, int64_t rows,
                                 int64_t columns, int64_t depth, int dtype, int64_t processors, uintptr_t stream);
void gelu_product_hopper_backward(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride, bool b_turned,
                                  uintptr_t bias, bool bias_wide, uintptr_t h, uintptr_t activation, uintptr_t dh,
                                  uintptr_t dbias, uintptr_t partials, int64_t rows, int64_t columns, int64_t depth,
                                  int dtype, int64_t processors, uintptr_t stream);
// The sum over rows in fp32; partials: (strips, columns).
void column_sum(uintptr_t x, int64_t x_stride, uintptr_t sum, uintptr_t partials, int64_t strips, int64_t rows,
                int64_t columns, int dtype, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

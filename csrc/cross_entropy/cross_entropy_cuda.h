// CUDA cross-entropy: pointers, sizes and strides (in elements) as integers; see cross_entropy.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// The number of targets that are not ignored, fp32. Absent tensors are 0 everywhere.
void cross_entropy_count(uintptr_t targets, uintptr_t count, int64_t rows, int64_t ignore_index,
                         uintptr_t stream);
// The sum of the losses (rows,), over `count` where it is given.
void cross_entropy_reduce(uintptr_t losses, uintptr_t count, uintptr_t loss, int64_t rows, uintptr_t stream);
// With `gradient` the logits become the gradient of the sum of losses, over `count` where it is given.
// shared_limit: bytes of shared memory that a block may have.
void cross_entropy_forward(uintptr_t logits, int64_t stride, uintptr_t targets, uintptr_t losses,
                           uintptr_t logprobs, uintptr_t statistics, uintptr_t count, bool gradient,
                           int64_t rows, int64_t columns, int64_t classes, int64_t ignore_index,
                           double smoothing, double z_loss, int64_t shared_limit, int dtype, uintptr_t stream);
void cross_entropy_backward(uintptr_t dloss, int64_t dloss_stride, uintptr_t logits, int64_t stride,
                            uintptr_t targets, uintptr_t statistics, uintptr_t count, uintptr_t dlogits,
                            int64_t dlogits_stride, int64_t rows, int64_t columns, int64_t classes,
                            int64_t ignore_index, double smoothing, double z_loss, int dtype, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

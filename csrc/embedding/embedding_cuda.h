// CUDA token and position embedding: pointers, sizes and strides (in elements) as integers; see embedding.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// wpe begins at the first position. idx has any strides.
void embedding_forward(uintptr_t idx, int64_t idx_sequence, int64_t idx_step, uintptr_t wte, int64_t wte_stride,
                       uintptr_t wpe, int64_t wpe_stride, uintptr_t out, int64_t batch, int64_t length,
                       int64_t columns, int64_t vocabulary, int dtype, uintptr_t stream);
// Tokens as int32 keys (batch * length,); unknown ones become `vocabulary`.
void embedding_keys(uintptr_t idx, int64_t idx_sequence, int64_t idx_step, uintptr_t keys, int64_t batch,
                    int64_t length, int64_t vocabulary, uintptr_t stream);
// keys sorted with their places `order` (int64). dwte holds zeros. partials: (tiles of 32, 2, columns) fp32.
void embedding_tokens(uintptr_t dy, int64_t dy_stride, uintptr_t keys, uintptr_t order, uintptr_t dwte,
                      uintptr_t partials, int64_t count, int64_t columns, int64_t vocabulary, int dtype,
                      uintptr_t stream);
void embedding_positions(uintptr_t dy, int64_t dy_stride, uintptr_t dwpe, int64_t batch, int64_t length,
                         int64_t columns, int64_t positions, int64_t position, int dtype, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

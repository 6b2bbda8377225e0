// CUDA attention: pointers, sizes and strides (in elements) as integers; see attention.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// A (B, T, H, D) tensor is an address and its strides over b, t and h; D is contiguous. With q_starts and
// k_starts (int32, batch + 1) they are documents in one row: strides over b are 0, `queries` and `keys` are those
// of the longest, and causal counts from a document's end instead of by `diagonal`. lse is two planes of fp32,
// `lse_plane` elements apart; `delta` is one. dtype: 0 fp32, 1 bf16, 2 fp16. Absent tensors are 0.
void attention_forward(uintptr_t q, int64_t q_b, int64_t q_t, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_t,
                       int64_t k_h, uintptr_t v, int64_t v_b, int64_t v_t, int64_t v_h, uintptr_t out,
                       int64_t out_b, int64_t out_t, int64_t out_h, uintptr_t lse, int64_t lse_b, int64_t lse_h,
                       int64_t lse_plane, uintptr_t q_starts, uintptr_t k_starts, uintptr_t seed, int64_t batch,
                       int64_t heads, int64_t queries, int64_t keys, int64_t size, bool causal, int64_t diagonal,
                       double scale, double factor, int threshold, int dtype, uintptr_t stream);
void attention_backward(uintptr_t dout, int64_t dout_b, int64_t dout_t, int64_t dout_h, uintptr_t q, int64_t q_b,
                        int64_t q_t, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_t, int64_t k_h, uintptr_t v,
                        int64_t v_b, int64_t v_t, int64_t v_h, uintptr_t out, int64_t out_b, int64_t out_t,
                        int64_t out_h, uintptr_t dq, int64_t dq_b, int64_t dq_t, int64_t dq_h, uintptr_t dk,
                        int64_t dk_b, int64_t dk_t, int64_t dk_h, uintptr_t dv, int64_t dv_b, int64_t dv_t,
                        int64_t dv_h, uintptr_t lse, uintptr_t delta, int64_t lse_b, int64_t lse_h,
                        int64_t lse_plane, uintptr_t q_starts, uintptr_t k_starts, uintptr_t seed, int64_t batch,
                        int64_t heads, int64_t queries, int64_t keys, int64_t size, bool causal, int64_t diagonal,
                        double scale, double factor, int threshold, int dtype, uintptr_t stream);
// The same forward on Hopper: head size 64, bf16 or fp16, no dropout, no documents, scale > 0, keys > 0 and
// diagonal >= 0; strides of 64 elements at least, in multiples of 16 bytes. lse is contiguous.
void attention_hopper_forward(uintptr_t q, int64_t q_b, int64_t q_t, int64_t q_h, uintptr_t k, int64_t k_b,
                              int64_t k_t, int64_t k_h, uintptr_t v, int64_t v_b, int64_t v_t, int64_t v_h,
                              uintptr_t out, int64_t out_b, int64_t out_t, int64_t out_h, uintptr_t lse,
                              int64_t batch, int64_t heads, int64_t queries, int64_t keys, bool causal,
                              int64_t diagonal, double scale, int dtype, int64_t processors, uintptr_t stream);
// The same backward: queries > 0; delta, (batch, heads, queries), is room for the kernels.
void attention_hopper_backward(uintptr_t dout, int64_t dout_b, int64_t dout_t, int64_t dout_h, uintptr_t q,
                               int64_t q_b, int64_t q_t, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_t,
                               int64_t k_h, uintptr_t v, int64_t v_b, int64_t v_t, int64_t v_h, uintptr_t out,
                               int64_t out_b, int64_t out_t, int64_t out_h, uintptr_t dq, int64_t dq_b, int64_t dq_t,
                               int64_t dq_h, uintptr_t dk, int64_t dk_b, int64_t dk_t, int64_t dk_h, uintptr_t dv,
                               int64_t dv_b, int64_t dv_t, int64_t dv_h, uintptr_t lse, uintptr_t delta,
                               int64_t batch, int64_t heads, int64_t queries, int64_t keys, bool causal,
                               int64_t diagonal, double scale, int dtype, int64_t processors, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

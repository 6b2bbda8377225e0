// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
// A (B, T, H, D) tensor is an address and its strides in elements over b, t and h; D is contiguous.
// Dropout counts batch entries from first_batch on: a document of many is a call of its own.
int64_t attention_forward_workspace(int64_t keys, int64_t size, int threads);
int64_t attention_backward_workspace(int64_t heads, int64_t queries, int64_t keys, int64_t size, int threads);
void attention_forward(uintptr_t q, int64_t q_b, int64_t q_t, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_t,
                       int64_t k_h, uintptr_t v, int64_t v_b, int64_t v_t, int64_t v_h, uintptr_t out,
                       int64_t out_b, int64_t out_t, int64_t out_h, uintptr_t lse, uintptr_t workspace,
                       int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t size,
                       int64_t diagonal, float scale, double dropout, int64_t seed, int64_t first_batch, int dtype,
                       int threads);
void attention_backward(uintptr_t dout, int64_t dout_b, int64_t dout_t, int64_t dout_h, uintptr_t q, int64_t q_b,
                        int64_t q_t, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_t, int64_t k_h, uintptr_t v,
                        int64_t v_b, int64_t v_t, int64_t v_h, uintptr_t out, int64_t out_b, int64_t out_t,
                        int64_t out_h, uintptr_t lse, uintptr_t dq, int64_t dq_b, int64_t dq_t, int64_t dq_h,
                        uintptr_t dk, int64_t dk_b, int64_t dk_t, int64_t dk_h, uintptr_t dv, int64_t dv_b,
                        int64_t dv_t, int64_t dv_h, uintptr_t workspace, int64_t batch, int64_t heads,
                        int64_t queries, int64_t keys, int64_t size, int64_t diagonal, float scale,
                        double dropout, int64_t seed, int64_t first_batch, int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
int64_t embedding_forward(uintptr_t idx, uintptr_t wte, int64_t wte_stride, uintptr_t wpe, int64_t wpe_stride,
                          uintptr_t out, int64_t batch, int64_t length, int64_t columns, int64_t vocabulary,
                          int dtype, int threads);
void embedding_backward(uintptr_t idx, uintptr_t dy, int64_t dy_stride, uintptr_t dwte, uintptr_t dwpe,
                        uintptr_t links, uintptr_t workspace, int64_t batch, int64_t length, int64_t columns,
                        int64_t vocabulary, int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

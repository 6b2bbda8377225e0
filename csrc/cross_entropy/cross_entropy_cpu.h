// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
int64_t cross_entropy_count(uintptr_t targets, int64_t rows, int64_t classes, int64_t ignore_index);
void cross_entropy_forward(uintptr_t logits, int64_t stride, uintptr_t targets, uintptr_t loss,
                           uintptr_t logprobs, uintptr_t statistics, bool overwrite, float factor,
                           int64_t rows, int64_t columns, int64_t classes, int64_t ignore_index, float smoothing, float z_loss, int dtype,
                           int threads);
void cross_entropy_backward(uintptr_t upstream, int64_t upstream_stride, float factor, uintptr_t logits,
                            int64_t stride, uintptr_t targets, uintptr_t statistics, uintptr_t dlogits,
                            int64_t dlogits_stride, int64_t rows, int64_t columns, int64_t classes,
                            int64_t ignore_index, float smoothing, float z_loss, int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

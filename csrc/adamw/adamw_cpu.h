// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
void adamw_step(uintptr_t table, int64_t tensors, uintptr_t grad_scale, uintptr_t seed, double step, double lr,
                double beta1, double beta2, double eps, double weight_decay, int threads);
void global_norm(uintptr_t table, int64_t tensors, uintptr_t norm, uintptr_t partials, int64_t blocks, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
void column_sum(uintptr_t x, int64_t x_stride, uintptr_t sum, uintptr_t workspace, int64_t rows, int64_t columns,
                int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
void gelu_forward(uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y, int64_t rows, int64_t columns,
                  int dtype, int threads);
void gelu_backward(uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t dx,
                   uintptr_t activation, uintptr_t dbias, uintptr_t workspace, int64_t rows, int64_t columns,
                   int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

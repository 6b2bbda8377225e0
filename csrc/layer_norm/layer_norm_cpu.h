// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
void layer_norm_forward(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
                        uintptr_t weight, uintptr_t bias, uintptr_t sum, uintptr_t y, uintptr_t mean,
                        uintptr_t rstd, int64_t rows, int64_t columns, float eps, double dropout,
                        int64_t seed, int dtype, int threads);
void layer_norm_backward(uintptr_t dy, int64_t dy_stride, uintptr_t dsum, int64_t dsum_stride, uintptr_t x,
                         int64_t x_stride, uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t dx,
                         uintptr_t dweight, uintptr_t dbias, uintptr_t workspace, int64_t rows,
                         int64_t columns, int dtype, int threads);
void dropout_rows(uintptr_t ds, uintptr_t dx, int64_t rows, int64_t columns, double dropout, int64_t seed,
                  int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

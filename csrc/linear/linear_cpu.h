// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
int64_t matmul_workspace(int64_t rows, int64_t columns, int64_t depth, bool a_across, bool b_across, int threads);
void matmul(uintptr_t a, int64_t a_stride, bool a_across, uintptr_t b, int64_t b_stride, bool b_across, uintptr_t c,
            int64_t c_stride, uintptr_t bias, uintptr_t workspace, int64_t rows, int64_t columns, int64_t depth,
            bool add, int threads);
void column_sum(uintptr_t x, int64_t x_stride, uintptr_t sum, uintptr_t workspace, int64_t rows, int64_t columns,
                int dtype, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

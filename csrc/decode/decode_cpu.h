// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
int64_t decode_workspace(int64_t rows, int64_t capacity, int64_t n_head, int64_t n_embd, int threads);
int64_t decode_step(uintptr_t table, uintptr_t idx, uintptr_t keys, uintptr_t values, uintptr_t logits,
                    uintptr_t workspace, int64_t batch, int64_t length, int64_t position, int64_t capacity,
                    int64_t n_layer, int64_t n_head, int64_t n_embd, int64_t vocab_size, float eps, bool every,
                    int weights, int threads);
int64_t few_rows_workspace(int64_t rows, int64_t columns);
void few_rows_linear(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t bias, uintptr_t y, uintptr_t workspace,
                     int64_t rows, int64_t columns, int64_t outputs, int weights, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

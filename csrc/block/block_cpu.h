// Included once per instruction set with GPT2FAST_ISA defined; so it has no include guard.
namespace gpt2fast {
namespace GPT2FAST_ISA {
int64_t block_saved(int64_t batch, int64_t length, int64_t n_head, int64_t n_embd, int64_t hidden, bool branch);
int64_t block_workspace(int64_t batch, int64_t length, int64_t n_head, int64_t n_embd, int64_t hidden, bool backward,
                        bool keeps, int threads);
void block_forward(uintptr_t table, int64_t batch, int64_t length, int64_t n_head, int64_t n_embd, int64_t hidden,
                   float eps_1, float eps_2, double attention_dropout, double branch_dropout, double mlp_dropout,
                   int threads);
void block_backward(uintptr_t table, int64_t batch, int64_t length, int64_t n_head, int64_t n_embd, int64_t hidden,
                    double attention_dropout, double branch_dropout, double mlp_dropout, int threads);
}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

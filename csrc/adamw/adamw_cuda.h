// CUDA AdamW and global norm over lists of tensors; see adamw.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// table: on the host, (count, 8) int64: addresses of p, g, m, v, master and step (0 where there is none), the
// number of elements, p's dtype. lr and grad_scale may be on the device instead (0: `lr`, 1). seed: an int64 on the
// device, or 0: bf16 p is rounded to the nearest. step: used for that, where no steps are on the device, as are
// correction1, correction2: 1 - beta^step, where no steps are on the device; log1, log2: of the betas.
void adamw_step(uintptr_t table, int64_t count, uintptr_t lr_tensor, uintptr_t grad_scale, uintptr_t seed,
                double step, double lr, double correction1, double correction2, double log1, double log2,
                double beta1, double beta2, double eps, double weight_decay, uintptr_t stream);
// How many partial sums global_norm needs for the tensors of a table (count, 3): address, elements, dtype.
int64_t global_norm_partials(uintptr_t table, int64_t count);
// partials: fp64.
void global_norm(uintptr_t partials, uintptr_t norm, uintptr_t table, int64_t count, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

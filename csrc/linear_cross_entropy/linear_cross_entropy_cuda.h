// CUDA linear + cross-entropy: addresses and sizes as integers; see linear_cross_entropy.cu.
#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// values (size,) fp32 *= factor / count, numbers on the device, either absent where 0; count = 0 gives 0.
void scale(uintptr_t values, uintptr_t factor, uintptr_t count, int64_t size, uintptr_t stream);

}  // namespace cuda
}  // namespace gpt2fast

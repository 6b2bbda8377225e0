#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// Reverses each block of 64 floats of x into y, with a fault by name ("" for none).
void fault(const char* name, uintptr_t x, uintptr_t y, int64_t count);

}  // namespace cuda
}  // namespace gpt2fast

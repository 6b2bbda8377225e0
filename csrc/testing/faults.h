#pragma once
#include <cstdint>

namespace gpt2fast {
namespace cuda {

// Reverses each block of 64 floats of x into y, with a fault by name ("" for none).
void fault(const char* name, uintptr_t x, uintptr_t y, int64_t count);
// c (32, 16) fp32 = a (32, K) b (K, 16), stored (K, 32) where a_turned, and (16, K) where not b_turned; K is a
// multiple of 8 where it is contiguous. plain: fragments by single loads instead of ldmatrix.
void product_fault(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int64_t depth, bool a_turned,
                   bool b_turned, bool plain, int dtype);
// c (rows, columns) = a (rows, K) b (K, columns) of one dtype, on wgmma and TMA: rows <= 64, columns <= 256; b is
// stored (columns, K) where not b_turned. K and columns are multiples of 8.
void hopper_fault(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int64_t rows, int64_t columns,
                  int64_t depth, bool b_turned, int dtype);
// c (64, 64) fp32 = a (64, 64) b[1, :, 1], a in registers, b (2, rows, 3, 64) of the same dtype, rows past the last 0.
void left_fault(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int64_t rows, int dtype);

}  // namespace cuda
}  // namespace gpt2fast

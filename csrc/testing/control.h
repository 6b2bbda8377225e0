// How tests and reports direct the emulator, through the bindings.
#pragma once
#include <string>
#include <vector>

#include "testing/emulator.h"

namespace emulator {

struct Tensor {
  uintptr_t address;
  size_t bytes, element;
};
struct Launch {
  std::string symbol, op;  // the kernel's mangled name, as nvcc has it
  dim3 grid;
  int threads;
  size_t shared;
};

// The memory that the following launches may touch.
void know(const std::vector<Tensor>& tensors);
// records: launches are listed and not run. reversed: threads take their turns from the last to the first.
void options(bool records, bool reversed);
// The launches since the last call.
std::vector<Launch> launches();

}  // namespace emulator

// gpt2fast._cpu: one submodule per instruction set with the same functions, and which of them run here.
// Pointers and sizes come in as integers, so nothing here depends on torch; the Python side checks them.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/tensors.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#define GPT2FAST_ISA portable
#include "declare.inc"
#undef GPT2FAST_ISA
#ifdef GPT2FAST_HAS_wide
#define GPT2FAST_ISA wide
#include "declare.inc"
#undef GPT2FAST_ISA
#endif
#ifdef GPT2FAST_HAS_avx2
#define GPT2FAST_ISA avx2
#include "declare.inc"
#undef GPT2FAST_ISA
#endif
#ifdef GPT2FAST_HAS_avx512
#define GPT2FAST_ISA avx512
#include "declare.inc"
#undef GPT2FAST_ISA
#endif

namespace py = pybind11;

#define BIND(name) module.def(#name, &gpt2fast::GPT2FAST_ISA::name, py::call_guard<py::gil_scoped_release>())

static void bind_portable(py::module_ module) {
#define GPT2FAST_ISA portable
#include "kernels.inc"
#undef GPT2FAST_ISA
}
#ifdef GPT2FAST_HAS_wide
static void bind_wide(py::module_ module) {
#define GPT2FAST_ISA wide
#include "kernels.inc"
#undef GPT2FAST_ISA
}
#endif
#ifdef GPT2FAST_HAS_avx2
static void bind_avx2(py::module_ module) {
#define GPT2FAST_ISA avx2
#include "kernels.inc"
#undef GPT2FAST_ISA
}
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#ifdef GPT2FAST_HAS_avx512
static void bind_avx512(py::module_ module) {
#define GPT2FAST_ISA avx512
#include "kernels.inc"
#undef GPT2FAST_ISA
}
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// glibc hands big freed blocks back to the kernel and faults them in again at the next step. Keeping them
// costs memory and saves the faults. Returns false where the C library has no such setting.
static bool keep_freed_memory() {
#if defined(__GLIBC__)
  // M_MMAP_MAX, not M_MMAP_THRESHOLD: glibc before 2.35 refuses thresholds over 32 MB.
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, 2000000000) == 1 &&
         mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
  return false;
#endif
}

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of gpt2fast; pointers and sizes as integers. Use gpt2fast.functional.";
  py::list runnable;  // instruction sets that this CPU runs, the fastest last
#ifdef GPT2FAST_HAS_wide
  bind_wide(module.def_submodule("wide"));
  runnable.append("wide");
#endif
  bind_portable(module.def_submodule("portable"));
  runnable.append("portable");
#ifdef GPT2FAST_HAS_avx2
  bind_avx2(module.def_submodule("avx2"));
  if (has_avx2()) runnable.append("avx2");
#endif
#ifdef GPT2FAST_HAS_avx512
  bind_avx512(module.def_submodule("avx512"));
  if (has_avx512()) runnable.append("avx512");
#endif
  module.attr("runnable") = runnable;
#if defined(__x86_64__)
  module.attr("amd") = bool(__builtin_cpu_is("amd"));
#else
  module.attr("amd") = false;
#endif
#ifdef GPT2FAST_VNNI
  module.attr("vnni") = true;  // built in; where the CPU has it, it is used
#else
  module.attr("vnni") = false;
#endif
#ifdef GPT2FAST_OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("keep_freed_memory", &keep_freed_memory);
  module.def("connect", &gpt2fast::tensors::connect);
}

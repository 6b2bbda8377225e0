// gpt2fast._cuda: the CUDA kernels; pointers, sizes and the stream as integers, so nothing here depends on
// torch; the Python side checks them. With GPT2FAST_EMULATED this binds the tests' emulator as well.
#include <pybind11/pybind11.h>

#include "adamw/adamw_cuda.h"
#include "attention/attention_cuda.h"
#include "cross_entropy/cross_entropy_cuda.h"
#include "embedding/embedding_cuda.h"
#include "gelu/gelu_cuda.h"
#include "gelu_mlp/gelu_mlp_cuda.h"
#include "layer_norm/layer_norm_cuda.h"
#include "linear_cross_entropy/linear_cross_entropy_cuda.h"

#ifdef GPT2FAST_EMULATED
#include "testing/bindings.inc"
#endif

namespace py = pybind11;

#define BIND(name) module.def(#name, &gpt2fast::cuda::name, py::call_guard<py::gil_scoped_release>())

// To add an op: one #include above and its functions here.
PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of gpt2fast; pointers, sizes and streams as integers. Use gpt2fast.functional.";
  BIND(layer_norm_forward);
  BIND(layer_norm_backward);
  BIND(dropout_rows);
  BIND(cross_entropy_count);
  BIND(cross_entropy_reduce);
  BIND(cross_entropy_forward);
  BIND(cross_entropy_backward);
  BIND(scale);
  BIND(gelu_forward);
  BIND(gelu_backward);
  BIND(attention_forward);
  BIND(attention_backward);
  BIND(attention_hopper_forward);
  BIND(attention_hopper_backward);
  BIND(gelu_product_forward);
  BIND(gelu_product_backward);
  BIND(gelu_product_hopper_forward);
  BIND(gelu_product_hopper_backward);
  BIND(column_sum);
  BIND(embedding_forward);
  BIND(embedding_keys);
  BIND(embedding_tokens);
  BIND(embedding_positions);
  BIND(adamw_step);
  BIND(global_norm_partials);
  BIND(global_norm);
#ifdef GPT2FAST_EMULATED
  bind_emulator(module);
  module.attr("emulated") = true;
#else
  module.attr("emulated") = false;
  module.attr("archs") = GPT2FAST_CUDA_ARCHS;
#endif
}

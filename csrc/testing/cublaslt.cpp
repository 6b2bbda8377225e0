// A stand-in for cuBLASLt on host memory, for the tests of gpt2fast/ops/gelu_mlp/cublaslt.py: the few functions
// that it calls, as the library's manual describes them. It proves the arguments, not the library.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Product {
  int transposed = 0;
  uint32_t epilogue = 1;
  void *bias = nullptr, *aux = nullptr;
  int64_t aux_stride = 0;
};

static float get(const void* from, int type, size_t i) {
  if (type == 0) return ((const float*)from)[i];
  if (type == 2) return float(((const _Float16*)from)[i]);
  const uint32_t bits = uint32_t(((const uint16_t*)from)[i]) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
static void put(void* to, int type, size_t i, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (type == 0)
    ((float*)to)[i] = x;
  else if (type == 2)
    ((_Float16*)to)[i] = _Float16(x);
  else
    ((uint16_t*)to)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

extern "C" {
size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void** handle) { return *handle = new int, 0; }
int cublasLtMatmulDescCreate(Product** made, int compute, int scale) {
  *made = new Product;
  return compute == 68 && scale == 0 ? 0 : 7;
}
int cublasLtMatmulDescSetAttribute(Product* p, int attribute, const void* value, size_t bytes) {
  void* to = attribute == 3    ? (void*)&p->transposed
             : attribute == 7  ? (void*)&p->epilogue
             : attribute == 8  ? (void*)&p->bias
             : attribute == 11 ? (void*)&p->aux
             : attribute == 12 ? (void*)&p->aux_stride
                               : nullptr;
  if (!to || bytes != (attribute < 8 ? 4 : 8)) return 7;
  memcpy(to, value, bytes);
  return 0;
}
int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *made = new Layout{type, rows, columns, stride};
  return stride >= int64_t(rows) ? 0 : 7;
}
int cublasLtMatmulPreferenceCreate(void** made) { return *made = new int, 0; }
int cublasLtMatmulPreferenceDestroy(void* made) { return delete (int*)made, 0; }
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t bytes) {
  return bytes == (attribute == 1 ? 8 : 4) ? 0 : 7;
}
int cublasLtMatmulAlgoGetHeuristic(void*, const Product*, const Layout*, const Layout*, const Layout*, const Layout*,
                                   void*, int wanted, uint64_t (*found)[12], int* count) {
  memset(found, 0, 96);
  (*found)[8] = 1024;  // bytes of workspace
  *count = wanted;
  return 0;
}
int cublasLtMatmul(void*, const Product* p, const float* alpha, const void* a, const Layout* la, const void* b,
                   const Layout* lb, const float* beta, const void*, const Layout*, void* d, const Layout* ld,
                   const void*, void*, size_t workspace, void*) {
  const uint64_t depth = p->transposed ? la->rows : la->columns;
  if (*alpha != 1 || *beta != 0 || workspace != 1024 || depth != lb->rows || lb->columns != ld->columns ||
      (p->transposed ? la->columns : la->rows) != ld->rows)
    return 7;
  const bool gelu = p->epilogue & 32, bias = p->epilogue & 4, bgrad = p->epilogue & 16, slope = p->epilogue & 64;
  for (uint64_t i = 0; i < ld->rows; ++i) {
    float total = 0;
    for (uint64_t j = 0; j < ld->columns; ++j) {
      float x = 0;
      for (uint64_t k = 0; k < depth; ++k)
        x += get(a, la->type, p->transposed ? i * la->stride + k : k * la->stride + i) *
             get(b, lb->type, j * lb->stride + k);
      if (bias) x += get(p->bias, ld->type, i);
      if (gelu && p->epilogue & 128) put(p->aux, ld->type, j * p->aux_stride + i, x);
      const float z = slope ? get(p->aux, ld->type, j * p->aux_stride + i) : x;
      const float inner = 0.7978845608f * (z + 0.044715f * z * z * z), t = tanhf(inner);
      if (gelu) x = 0.5f * z * (1 + t);
      if (slope) x *= 0.5f * (1 + t) + 0.5f * z * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * z * z);
      total += x;
      put(d, ld->type, j * ld->stride + i, x);
    }
    if (bgrad) put(p->bias, ld->type, i, total);
  }
  return 0;
}
}

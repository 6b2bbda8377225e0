// A float vector as wide as the instruction set, on GCC/Clang vector extensions: one kernel source
// serves AVX-512, AVX2 and portable code (SSE2, NEON), each compiled from its own translation unit.
//
// Everything lives in namespace gpt2fast::GPT2FAST_ISA and includes no C++ library header: an inline
// function of a shared namespace compiled with AVX-512 flags could replace the baseline's at link time.
#pragma once
#include <stdint.h>

// GPT2FAST_VL sets the number of lanes without intrinsics: tests run AVX-512's sixteen on any machine.
#if !defined(GPT2FAST_VL) && defined(__AVX512F__)
#define GPT2FAST_AVX512 1
#elif !defined(GPT2FAST_VL) && defined(__AVX2__)
#define GPT2FAST_AVX2 1
#endif
#if defined(GPT2FAST_AVX512) || defined(GPT2FAST_AVX2)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define GPT2FAST_INLINE static inline __attribute__((always_inline))

namespace gpt2fast {
namespace GPT2FAST_ISA {

typedef int64_t i64;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(GPT2FAST_VL)
constexpr int VL = GPT2FAST_VL;  // floats in a vector
#elif defined(GPT2FAST_AVX512)
constexpr int VL = 16;
#elif defined(GPT2FAST_AVX2)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

GPT2FAST_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 keeps -0 and NaN, as + would not
GPT2FAST_INLINE vf as_float(vu x) { return (vf)x; }
GPT2FAST_INLINE vu as_bits(vf x) { return (vu)x; }
GPT2FAST_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// a > b ? a : b, so the second operand comes back where either is NaN (as x86 maxps does).
GPT2FAST_INLINE vf vmax(vf a, vf b) {
#if defined(GPT2FAST_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(GPT2FAST_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
GPT2FAST_INLINE vf vmin(vf a, vf b) {
#if defined(GPT2FAST_AVX512)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(GPT2FAST_AVX2)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
GPT2FAST_INLINE vf vsqrt(vf x) {
#if defined(GPT2FAST_AVX512)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(GPT2FAST_AVX2)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < VL; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

GPT2FAST_INLINE float hsum(vf x) {
  float part[VL];
  __builtin_memcpy(part, &x, sizeof x);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}
GPT2FAST_INLINE float hmax(vf x) {
  float part[VL];
  __builtin_memcpy(part, &x, sizeof x);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  return part[0];
}

// ---- loads and stores: T is float, bf16 or f16; arithmetic is always fp32 -------------------------

GPT2FAST_INLINE vf widen(const vh h, bf16) { return as_float(__builtin_convertvector(h, vu) << 16); }
GPT2FAST_INLINE vh narrow(vf x, bf16) {  // round to nearest even, NaN stays NaN
  const vu u = as_bits(x);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), vh);
}

GPT2FAST_INLINE vf widen(const vh h, f16) {
#if defined(GPT2FAST_AVX512)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(GPT2FAST_AVX2)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent re-biased by a multiplication, which also normalises subnormals; inf and NaN set apart.
  const vu u = __builtin_convertvector(h, vu), magnitude = u & 0x7fffu;
  const vf scaled = as_float(magnitude << 13) * splat(0x1p112f);
  const vu special = (vu)(magnitude >= 0x7c00u) & ((magnitude << 13) | 0x7f800000u);
  const vu finite = (vu)(magnitude < 0x7c00u) & as_bits(scaled);
  return as_float(special | finite | ((u & 0x8000u) << 16));
#endif
}
GPT2FAST_INLINE vh narrow(vf x, f16) {  // round to nearest even
#if defined(GPT2FAST_AVX512)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(GPT2FAST_AVX2)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu u = as_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Below 2^-14 an addition of 0.5 leaves the rounded subnormal in the low mantissa bits.
  const vu subnormal = as_bits(as_float(magnitude) + splat(0.5f)) - 0x3f000000u;
  const vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const vu nan = (vu)(magnitude > 0x7f800000u), large = (vu)(magnitude >= 0x47800000u);
  const vu small = (vu)(magnitude < 0x38800000u);
  const vu overflow = (0x7e00u & nan) | (0x7c00u & ~nan);
  const vu value = (large & overflow) | (~large & ((small & subnormal) | (~small & normal)));
  return __builtin_convertvector(value | sign, vh);
#endif
}

GPT2FAST_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
GPT2FAST_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
template <class T>
GPT2FAST_INLINE vf load(const T* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h, T());
}
template <class T>
GPT2FAST_INLINE void store(T* p, vf x) {
  const vh h = narrow(x, T());
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n < VL elements; the missing ones are `fill`.
template <class T>
GPT2FAST_INLINE vf load_n(const T* p, i64 n, float fill = 0.0f) {
  if (n > VL) __builtin_unreachable();  // gcc warns of bounds otherwise
  T part[VL] = {};
  for (i64 i = 0; i < n; ++i) part[i] = p[i];
  vf x = load(part);
  for (int i = 0; i < VL; ++i) x[i] = i < n ? x[i] : fill;
  return x;
}
template <class T>
GPT2FAST_INLINE void store_n(T* p, vf x, i64 n) {
  T part[VL];
  store(part, x);
  for (i64 i = 0; i < n; ++i) p[i] = part[i];
}

// f(vector of row p at column c, number of valid columns) over the whole row: full vectors, then the tail.
template <class Body>
GPT2FAST_INLINE void for_columns(i64 columns, const Body& body) {
  i64 c = 0;
  for (; c + VL <= columns; c += VL) body(c, i64(VL));
  if (c < columns) body(c, columns - c);
}
// The same with body(k, c, n), k = 0..3 in turn: four accumulators hide an addition's latency.
template <class Body>
GPT2FAST_INLINE void for_columns_in_turn(i64 columns, const Body& body) {
  i64 c = 0;
  for (; c + 4 * VL <= columns; c += 4 * VL) {
    body(0, c, i64(VL));
    body(1, c + VL, i64(VL));
    body(2, c + 2 * VL, i64(VL));
    body(3, c + 3 * VL, i64(VL));
  }
  for (; c + VL <= columns; c += VL) body(0, c, i64(VL));
  if (c < columns) body(0, c, columns - c);
}
GPT2FAST_INLINE float hsum(const vf (&x)[4]) { return hsum((x[0] + x[1]) + (x[2] + x[3])); }

template <class T>
GPT2FAST_INLINE vf load_at(const T* p, i64 n, float fill = 0.0f) {
  return n == VL ? load(p) : load_n(p, n, fill);
}
template <class T>
GPT2FAST_INLINE void store_at(T* p, vf x, i64 n) {
  if (n == VL)
    store(p, x);
  else
    store_n(p, x, n);
}

// One element. Narrowing goes through a vector so that rounding is defined in one place.
GPT2FAST_INLINE float get(const float* p) { return *p; }
template <class T>
GPT2FAST_INLINE float get(const T* p) {
  return load_n(p, 1)[0];
}
GPT2FAST_INLINE void put(float* p, float x) { *p = x; }
template <class T>
GPT2FAST_INLINE void put(T* p, float x) {
  store_n(p, splat(x), 1);
}

// ---- functions -------------------------------------------------------------------------------------

// exp(x): x = n ln2 + r, |r| <= ln2/2, exp(r) by a degree-6 minimax polynomial (relative error 3e-9,
// so the result is right to about one ulp). Below -87.3 the result is 0, above 88.7 inf; NaN stays NaN.
GPT2FAST_INLINE vf vexp(vf x) {
  const vf clamped = vmin(splat(88.8f), vmax(splat(-87.4f), x));  // this order keeps a NaN in x
  const vf shifted = clamped * 1.44269504f + 12582912.0f;          // 1.5 * 2^23: rounds to an integer
  const vf n = shifted - 12582912.0f;
  const vf r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  vf p = splat(0.001381459878757596f);
  p = p * r + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, since n reaches 128 where a single exponent field would overflow too early.
  const vi whole = (vi)as_bits(shifted) - 0x4b400000, half = whole >> 1;
  const vf first = as_float((vu)((half + 127) << 23)), second = as_float((vu)((whole - half + 127) << 23));
  const vf result = p * first * second;
  return select(x < -87.33654f, vf{}, result);
}

// Two-level summation keeps fp32 sums over many rows accurate: level one is flushed every FLUSH rows.
constexpr int FLUSH = 64;

// ---- threads ---------------------------------------------------------------------------------------

// The number of shares that parallel_shares makes: a small problem stays on one thread.
GPT2FAST_INLINE int share_count(i64 count, i64 grain, int threads) {
#if !defined(_OPENMP)
  threads = 1;
#endif
  const i64 units = (count + grain - 1) / grain;
  return threads < units ? threads : units > 1 ? int(units) : 1;
}

// body(share, begin, end) on contiguous, fixed shares of `count` items: the same bits at every call.
// Shares are multiples of `grain` items.
template <class Body>
GPT2FAST_INLINE void parallel_shares(i64 count, i64 grain, int threads, const Body& body) {
  threads = share_count(count, grain, threads);
#if defined(_OPENMP)
  if (threads > 1) {
    const i64 units = (count + grain - 1) / grain;
#pragma omp parallel num_threads(threads)
    {
      const i64 team = omp_get_num_threads(), me = omp_get_thread_num();
      // The team may be smaller than asked: shares follow the number asked, so that bits do not change.
      for (i64 t = me; t < threads; t += team) {
        const i64 begin = units * t / threads * grain, end = units * (t + 1) / threads * grain;
        body(int(t), begin, end < count ? end : count);
      }
    }
    return;
  }
#endif
  body(0, i64(0), count);
}

// What T a kernel's void pointers mean: body(T()) with T = float, bf16 or f16 for dtype 0, 1, 2.
template <class Body>
GPT2FAST_INLINE void with_dtype(int dtype, const Body& body) {
  if (dtype == 0)
    body(float());
  else if (dtype == 1)
    body(bf16());
  else
    body(f16());
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

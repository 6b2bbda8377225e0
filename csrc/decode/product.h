// Products of few rows with a large matrix: y[m][n] = sum over k of x[m][k] w[n][k], m < 64 or so.
//
//   weights   fp32; bf16; or int8 with a scale s[n] a row, w = q s. Rows of `columns` contiguous elements.
//   inputs    rows prepared once for many products: fp32 as they are; for bf16 reordered, since a shift and a
//             mask split a vector of bf16 into its even and odd elements; for int8 rounded to x = i t[m] with
//             |i| <= 32767. A pair of 16-bit products is one instruction on every x86 and costs on AVX2 what
//             8-bit inputs would: so the weights' rounding is the only one that counts.
//   moves     the weights once; at few rows that is the time.
//   work      tiles of TILE_N weight rows by up to TILE_M inputs, one accumulator vector each: an output's bits
//             depend neither on the number of rows nor on the threads. One group of inputs: memory is the limit,
//             and a tile's rows lie far apart, since a few long streams read faster than one. More: a tile's
//             rows are neighbours, and while they meet all inputs the next tile is fetched, evenly spread.
#pragma once
#include "common/tile.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

typedef int16_t vs __attribute__((vector_size(4 * VL)));  // 2 VL elements

constexpr i64 CHUNK = 512 * VL;  // columns that an int32 vector sums
#if defined(GPT2FAST_AVX512)
constexpr int TILE_N = 4, TILE_M = 6;  // of 32 registers
#else
constexpr int TILE_N = 3, TILE_M = 4;  // of 16
#endif

GPT2FAST_INLINE vf as_floats(vf x) { return x; }
GPT2FAST_INLINE vf as_floats(vi x) { return __builtin_convertvector(x, vf); }

// How weights of type W meet inputs: STEP elements at a time, loaded as V, added to an accumulator Sum.
template <class W>
struct Dot;

template <>
struct Dot<float> {
  typedef float Input;
  typedef vf Sum;
  static constexpr int STEP = VL;
  struct V {
    vf w;
  };
  GPT2FAST_INLINE V open(const float* w) { return {load(w)}; }
  GPT2FAST_INLINE Sum add(Sum sum, V v, const float* x) { return sum + v.w * load(x); }
};

template <>
struct Dot<bf16> {
  typedef float Input;
  typedef vf Sum;
  static constexpr int STEP = 2 * VL;
  struct V {
    vf even, odd;
  };
  GPT2FAST_INLINE V open(const bf16* w) {
    vu pairs;
    __builtin_memcpy(&pairs, w, sizeof pairs);
    return {as_float(pairs << 16), as_float(pairs & 0xffff0000u)};
  }
  GPT2FAST_INLINE Sum add(Sum sum, V v, const float* x) {
    return sum + v.even * load(x) + v.odd * load(x + VL);
  }
};

template <>
struct Dot<int8_t> {
  typedef int16_t Input;
  typedef vi Sum;
  static constexpr int STEP = 2 * VL;
  struct V {
    vs w;
  };
  GPT2FAST_INLINE V open(const int8_t* w) {
    typedef int8_t vb __attribute__((vector_size(2 * VL)));
    vb bytes;
    __builtin_memcpy(&bytes, w, sizeof bytes);
#if defined(GPT2FAST_AVX512)
    return {(vs)_mm512_cvtepi8_epi16((__m256i)bytes)};
#elif defined(GPT2FAST_AVX2)
    return {(vs)_mm256_cvtepi8_epi16((__m128i)bytes)};
#else
    return {__builtin_convertvector(bytes, vs)};
#endif
  }
  GPT2FAST_INLINE Sum add(Sum sum, V v, const int16_t* x) {
    vs i;
    __builtin_memcpy(&i, x, sizeof i);
#if defined(GPT2FAST_AVX512)
    return sum + (vi)_mm512_madd_epi16((__m512i)v.w, (__m512i)i);
#elif defined(GPT2FAST_AVX2)
    return sum + (vi)_mm256_madd_epi16((__m256i)v.w, (__m256i)i);
#else
    const vi a = (vi)v.w, b = (vi)i;
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
};
// int8 weights on a CPU with VNNI, on which a pair of products and its addition to a sum are one instruction: the same
// integers, so the same bits. As assembly, since the compiler may use it nowhere else in this instruction set's code.
#if defined(GPT2FAST_VNNI) && (defined(GPT2FAST_AVX512) || defined(GPT2FAST_AVX2))
#define GPT2FAST_DECODE_VNNI 1
struct int8_vnni {
  int8_t q;
};
template <>
struct Dot<int8_vnni> : Dot<int8_t> {
  GPT2FAST_INLINE V open(const int8_vnni* w) { return Dot<int8_t>::open(&w->q); }
  GPT2FAST_INLINE Sum add(Sum sum, V v, const int16_t* x) {
    vs i;
    __builtin_memcpy(&i, x, sizeof i);
#if defined(GPT2FAST_AVX512)
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(v.w), "v"(i));
#else
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(v.w), "x"(i));
#endif
    return sum;
  }
};
static bool has_vnni() {
#if defined(GPT2FAST_AVX512)
  return __builtin_cpu_supports("avx512vnni");
#else
  return __builtin_cpu_supports("avxvnni");
#endif
}
#endif
static_assert(CHUNK / VL * 127 * 32767 < (i64(1) << 31), "a lane's int32 sum would overflow");

// `columns` of some rows of a matrix and the distance between rows.
template <class W>
struct Rows {
  const W* at;
  i64 stride;
};

// sums[i + ROWS j] = the product of w row i and x row j over `columns`; `next` is fetched, `ahead` bytes a step.
template <class W, int ROWS, int INPUTS, bool FETCH>
static inline void tile(Rows<W> w, Rows<typename Dot<W>::Input> x, i64 columns, uintptr_t next, i64 ahead,
                        float* sums) {
  typedef Dot<W> D;
  typename D::Sum sum[ROWS][INPUTS] = {};
  const auto step = [&](const W* at, i64 stride, i64 k) __attribute__((always_inline)) {
    typename D::V v[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) v[i] = D::open(at + i * stride);
#pragma GCC unroll 8
    for (int j = 0; j < INPUTS; ++j)
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) sum[i][j] = D::add(sum[i][j], v[i], x.at + j * x.stride + k);
  };
  i64 k = 0;
  for (; k + D::STEP <= columns; k += D::STEP) {
    step(w.at + k, w.stride, k);
    if (FETCH) __builtin_prefetch((const void*)next);
    next += ahead;
  }
  if (k < columns) {  // inputs are padded with zeros
    W rest[ROWS][D::STEP] = {};
    for (int i = 0; i < ROWS; ++i)
      for (i64 c = k; c < columns; ++c) rest[i][c - k] = w.at[i * w.stride + c];
    step(rest[0], D::STEP, k);
  }
  constexpr int COUNT = ROWS * INPUTS, GROUPS = (COUNT + VL - 1) / VL;
  vf found[GROUPS][VL] = {};
#pragma GCC unroll 32
  for (int s = 0; s < COUNT; ++s) found[s / VL][s % VL] = as_floats(sum[s % ROWS][s / ROWS]);
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; ++g) store(sums + g * VL, lane_sums(found[g]));
}

template <class W, int ROWS, int INPUTS = TILE_M>
GPT2FAST_INLINE void tile_of(int inputs, bool fetch, Rows<W> w, Rows<typename Dot<W>::Input> x, i64 columns,
                             uintptr_t next, i64 ahead, float* sums) {
  if constexpr (INPUTS > 1)
    if (inputs < INPUTS) return tile_of<W, ROWS, INPUTS - 1>(inputs, fetch, w, x, columns, next, ahead, sums);
  if (fetch)
    tile<W, ROWS, INPUTS, true>(w, x, columns, next, ahead, sums);
  else
    tile<W, ROWS, INPUTS, false>(w, x, columns, next, ahead, sums);
}

template <class W>
struct Matrix {
  const W* at;
  const float* scale;  // a row, for int8
  const float* bias;
  i64 rows, columns;
};

// Rows ready for products, padded with zeros to a multiple of 2 VL.
template <class W>
struct Inputs {
  typename Dot<W>::Input* at;
  float* scale;  // a row, for int8
  i64 stride;
};
GPT2FAST_INLINE i64 padded(i64 columns) { return (columns + 2 * VL - 1) / (2 * VL) * (2 * VL); }

static void prepare(const float* x, i64 columns, const Inputs<float>& in, i64 row) {
  float* out = in.at + row * in.stride;
  for (i64 c = 0; c < columns; ++c) out[c] = x[c];
  for (i64 c = columns; c < padded(columns); ++c) out[c] = 0.0f;
}
static void prepare(const float* x, i64 columns, const Inputs<bf16>& in, i64 row) {
  float* out = in.at + row * in.stride;
  const i64 whole = columns / (2 * VL) * (2 * VL);
  for (i64 c = 0; c < whole; c += 2 * VL)
    for (int i = 0; i < VL; ++i) {
      out[c + i] = x[c + 2 * i];
      out[c + VL + i] = x[c + 2 * i + 1];
    }
  for (i64 c = whole; c < padded(columns); ++c) out[c] = 0.0f;
  for (i64 c = whole; c < columns; ++c) out[whole + (c - whole) / 2 + (c - whole) % 2 * VL] = x[c];
}
static void prepare(const float* x, i64 columns, const Inputs<int8_t>& in, i64 row) {
  int16_t* out = in.at + row * in.stride;
  vf most = {}, zero = {};
  for_columns(columns, [&](i64 c, i64 n) {
    const vf v = load_at(x + c, n);
    most = vmax(vmax(v, -v), most);
    zero += v * 0.0f;  // NaN where x is infinite or NaN
  });
  const float largest = hmax(most), scale = largest / 32767.0f;
  const bool finite = hsum(zero) == 0.0f;
  in.scale[row] = finite ? scale : __builtin_nanf("");  // then so are the row's outputs
  const float inverse = finite && scale > 0.0f ? 32767.0f / largest : 0.0f;
  for (i64 c = columns; c < padded(columns); ++c) out[c] = 0;
  for_columns(columns, [&](i64 c, i64 n) {
    // 1.5 * 2^23 rounds to an integer, whose two's complement is in the low bits.
    const vh i = __builtin_convertvector(as_bits(load_at(x + c, n) * inverse + 12582912.0f) & 0xffffu, vh);
    __builtin_memcpy(out + c, &i, uint64_t(n) * sizeof(int16_t));
  });
}
#if defined(GPT2FAST_DECODE_VNNI)
static void prepare(const float* x, i64 columns, const Inputs<int8_vnni>& in, i64 row) {
  prepare(x, columns, Inputs<int8_t>{in.at, in.scale, in.stride}, row);
}
#endif

// y[m][n] for the inputs m < count and begin <= n < end, without the bias.
template <class W>
static void product(const Matrix<W>& matrix, const Inputs<W>& in, i64 count, float* y, i64 y_stride, i64 begin,
                    i64 end) {
  const i64 groups = (count + TILE_M - 1) / TILE_M, tiles = (end - begin) / TILE_N;
  const bool streams = groups == 1;
  for (i64 k = 0; k < matrix.columns; k += CHUNK) {
    const i64 columns = matrix.columns - k < CHUNK ? matrix.columns - k : CHUNK;
    // Rows n, n + apart, ...
    const auto run = [&](i64 n, i64 rows, i64 apart) {
      const Rows<W> w{matrix.at + n * matrix.columns + k, apart * matrix.columns};
      const i64 next_bytes = rows * columns * i64(sizeof(W));
      for (i64 g = 0; g < groups; ++g) {
        const i64 m = count * g / groups, inputs = count * (g + 1) / groups - m;
        const Rows<typename Dot<W>::Input> x{in.at + m * in.stride + k, in.stride};
        const uintptr_t next = uintptr_t(w.at + rows * w.stride) + next_bytes * g / groups;
        const i64 ahead = next_bytes / groups / (columns / Dot<W>::STEP + 1);
        float sums[(TILE_N * TILE_M + VL - 1) / VL * VL] = {};
        if (rows == 1)
          tile_of<W, 1>(int(inputs), false, w, x, columns, next, ahead, sums);
        else
          tile_of<W, TILE_N>(int(inputs), !streams, w, x, columns, next, ahead, sums);
        for (i64 j = 0; j < inputs; ++j)
          for (i64 i = 0; i < rows; ++i) {
            const i64 o = n + i * apart;
            float part = sums[i + rows * j];
            if constexpr (sizeof(W) == 1) part *= matrix.scale[o] * in.scale[m + j];
            float& out = y[(m + j) * y_stride + o];
            out = k ? out + part : part;
          }
      }
    };
    for (i64 t = 0; t < tiles; ++t)
      streams ? run(begin + t, TILE_N, tiles) : run(begin + t * TILE_N, TILE_N, 1);
    for (i64 n = begin + tiles * TILE_N; n < end; ++n) run(n, 1, 1);
  }
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

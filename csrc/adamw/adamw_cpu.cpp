// AdamW on a whole model at once, and the norm over all gradients for clipping.
//
//   step      g' = g * grad_scale,  m += (1 - beta1) (g' - m),  v += (1 - beta2) (g'^2 - v)
//             p -= lr * weight_decay * p + lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   norm      sqrt(sum of all squares)
//   rounding  p to the nearest, or bf16 p, where there is a seed, up or down at random, up with the probability that
//             makes the mean p: 16 random bits are added below the last place and the rest cut off. Element e of
//             tensor t at a step has the word (seed, step, t, 0, e mod 2^32) of common/random.h.
//   source    Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", as torch.optim.AdamW. Written as
//             differences, 1 - beta is rounded relative to itself: beta2 = 0.999 in fp32 misses by 1e-5 of 1 - beta2,
//             and v would settle that far from the truth.
//   layout    a table row of int64 per tensor; all of a tensor's elements are contiguous in memory. p and g are
//             float, bf16 or f16, m and v are float. Half-precision p may have a float master w: then w is updated
//             and p is w rounded.
//   moves     step 7 elements per parameter (p, m, v read and written in place, g read), with a master 8 (w too, p is
//             not read); norm 1.
//   work      step: the elements of all tensors, one after the other, are shared out evenly among threads.
//             norm: blocks of BLOCK elements within a tensor, each summed in fp32 in two levels, and again in fp64
//             where squares vanish or overflow in fp32; the blocks' sums are added in fp64 in order: the number
//             of threads changes no bit.
#include "common/simd.h"
#include "common/random.h"
#include "adamw/adamw_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 STEP_GRAIN = 4096;
constexpr i64 BLOCK = 16384;

struct Update {  // what the step's scalars come to, in fp32
  float scale, new1, old1, new2, old2, decay, rate, inverse_root, eps;
};

// base + weight * (other - base): the small weight is given, so that its rounding is relative to it.
GPT2FAST_INLINE vf average(vf old_value, vf new_value, float new_weight, float old_weight) {
  return new_weight <= 0.5f ? old_value + (new_value - old_value) * new_weight
                            : new_value + (old_value - new_value) * old_weight;
}

// x as one of the two bf16 numbers around it; a NaN stays.
GPT2FAST_INLINE vf round_stochastically(vf x, vu words) {
  const vu u = as_bits(x), rounded = (u + (words >> 16)) & 0xffff0000u;
  const vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return as_float((rounded & ~nan) | (u & nan));
}

// Stores parameters from `element` of their tensor on; random: the tensor's words, or null.
template <class T>
GPT2FAST_INLINE void store_parameters(T* p, vf x, i64 n, const RandomRow*, i64) {
  store_at(p, x, n);
}
GPT2FAST_INLINE void store_parameters(bf16* p, vf x, i64 n, const RandomRow* random, i64 element) {
  store_at(p, random ? round_stochastically(x, random->words(element)) : x, n);
}

// Elements [begin, begin + count) of a tensor.
template <class T>
static void update(T* p, const T* g, float* m, float* v, float* w, i64 begin, i64 count, const Update& u,
                   const RandomRow* random) {
  p += begin, g += begin, m += begin, v += begin;
  if (w) w += begin;
  for_columns(count, [&](i64 i, i64 n) {
    const vf grad = load_at(g + i, n) * u.scale, value = w ? load_at(w + i, n) : load_at(p + i, n);
    const vf first = average(load_at(m + i, n), grad, u.new1, u.old1);
    const vf second = average(load_at(v + i, n), grad * grad, u.new2, u.old2);
    store_at(m + i, first, n);
    store_at(v + i, second, n);
    const vf direction = first / (vsqrt(second) * u.inverse_root + u.eps);
    const vf updated = value - (value * u.decay + direction * u.rate);
    if (w) store_at(w + i, updated, n);
    store_parameters(p + i, updated, n, random, begin + i);
  });
}

// body(tensor, begin, end) for the parts of the tensors that make up [begin, end) of their concatenation, where
// a tensor counts size(tensor) units.
template <class Size, class Body>
GPT2FAST_INLINE void for_parts(i64 tensors, i64 begin, i64 end, const Size& size, const Body& body) {
  i64 start = 0;
  for (i64 t = 0; t < tensors && start < end; ++t) {
    const i64 length = size(t);
    const i64 low = begin > start ? begin - start : 0, high = end - start < length ? end - start : length;
    if (low < high) body(t, low, high);
    start += length;
  }
}

// table: rows of p, g, m, v, w (0 where there is none), size, dtype, t. grad_scale: a float or 0; seed: an i64 or 0.
void adamw_step(uintptr_t table, i64 tensors, uintptr_t grad_scale, uintptr_t seed, double step, double lr,
                double beta1, double beta2, double eps, double weight_decay, int threads) {
  const auto row = [&](i64 t) { return (const i64*)table + 8 * t; };
  const double correction1 = 1.0 - __builtin_pow(beta1, step), correction2 = 1.0 - __builtin_pow(beta2, step);
  Update u;
  u.scale = grad_scale ? *(const float*)grad_scale : 1.0f;
  u.new1 = float(1.0 - beta1), u.old1 = float(beta1);
  u.new2 = float(1.0 - beta2), u.old2 = float(beta2);
  u.decay = float(lr * weight_decay), u.rate = float(lr / correction1);
  u.inverse_root = float(1.0 / __builtin_sqrt(correction2)), u.eps = float(eps);
  i64 total = 0;
  for (i64 t = 0; t < tensors; ++t) total += row(t)[5];
  parallel_shares(total, STEP_GRAIN, threads, [&](int, i64 begin, i64 end) {
    const auto size = [&](i64 t) { return row(t)[5]; };
    for_parts(tensors, begin, end, size, [&](i64 t, i64 low, i64 high) {
      const i64* r = row(t);
      with_dtype(int(r[6]), [&](auto type) {
        using T = decltype(type);
        const RandomRow random(seed ? *(const i64*)seed : 0, i64(step), r[7], 0);
        update((T*)r[0], (const T*)r[1], (float*)r[2], (float*)r[3], (float*)r[4], low, high - low, u,
               seed ? &random : nullptr);
      });
    });
  });
}

template <class T>
static double squares(const T* x, i64 count) {
  constexpr i64 GROUP = FLUSH * VL;
  vf total = {};
  for (i64 begin = 0; begin < count; begin += GROUP) {
    const i64 end = begin + GROUP < count ? begin + GROUP : count;
    vf sums[4] = {};
    i64 i = begin;
    for (; i + 4 * VL <= end; i += 4 * VL)
      for (int k = 0; k < 4; ++k) {
        const vf value = load(x + i + k * VL);
        sums[k] += value * value;
      }
    for (; i < end; i += VL) {
      const vf value = load_at(x + i, end - i < VL ? end - i : VL);
      sums[0] += value * value;
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  double sum = 0.0;
  for (int lane = 0; lane < VL; ++lane) sum += double(total[lane]);
  if (sum > 1e-20 && sum < 1e37) return sum;
  sum = 0.0;  // squares may have vanished or overflowed (or be NaN, or 0)
  for (i64 i = 0; i < count; ++i) sum += double(get(x + i)) * double(get(x + i));
  return sum;
}

// table: rows of pointer, size, dtype. partials: one double for each of `blocks`, the blocks of all tensors.
void global_norm(uintptr_t table, i64 tensors, uintptr_t norm, uintptr_t partials, i64 blocks, int threads) {
  const auto row = [&](i64 t) { return (const i64*)table + 3 * t; };
  parallel_shares(blocks, 1, threads, [&](int, i64 begin, i64 end) {
    double* out = (double*)partials + begin;
    const auto size = [&](i64 t) { return (row(t)[1] + BLOCK - 1) / BLOCK; };
    for_parts(tensors, begin, end, size, [&](i64 t, i64 low, i64 high) {
      const i64* r = row(t);
      with_dtype(int(r[2]), [&](auto type) {
        using T = decltype(type);
        for (i64 b = low; b < high; ++b) {
          const i64 rest = r[1] - b * BLOCK;
          *out++ = squares((const T*)r[0] + b * BLOCK, rest < BLOCK ? rest : BLOCK);
        }
      });
    });
  });
  double total = 0.0;
  for (i64 b = 0; b < blocks; ++b) total += ((const double*)partials)[b];
  *(float*)norm = float(__builtin_sqrt(total));
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

// Softmax attention without the (T x T) matrix in memory.
//
//   forward   S = scale q k^T, key j masked for query i where j > i + diagonal;  P = softmax(S)
//             out = M P v,  lse = log(sum exp S);  M = dropout's mask / (1 - dropout), or 1
//   backward  P = exp(S - lse),  dP = M (dout v^T),  delta = rowsum(dout out),  dS = P (dP - delta)
//             dv = (M P)^T dout,  dk = scale dS^T q,  dq = scale dS k
//   source    Dao et al. 2022, "FlashAttention" (blocks, recomputation); Milakov and Gimelshein 2018
//             (online softmax). Rows that see no key: out = 0, lse = -inf, no gradient.
//   layout    (B, T, H, D) with any strides but a contiguous D: q, k, v in place in packed qkv, k and v as
//             the first rows of a larger cache. Any D. lse is (2, B, H, T)
//             contiguous: lse and its rounding error.
//   moves     reads q, k, v once and writes out; forward 4 D, backward 10 D operations per visible pair.
//   work      Every product is a run of MR x NR register tiles: A broadcast, B row-major. Inputs are packed in
//             fp32 (k also transposed), zero-padded, into a workspace per thread that stays in L2. Beside the
//             tiles the next head's rows, and those of the outputs, are fetched.
//             forward: units of BQ queries of one head, shared out by visible pairs; a thread packs a head's
//             k and v once. At most DIRECT queries (decoding): k and v are read in place, one head a unit.
//             backward: units of one head's key blocks, dk and dv of a block stay near while the queries pass.
//             A head is split over several units where heads are few; dq is then added in fixed order.
//   saves     out and lse; the dropout mask is a hash of (seed, head, i, j), computed again.
#include "common/random.h"
#include "common/tile.h"

#include "attention/attention_cpu.h"

extern "C" float logf(float);

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 DIRECT = 4;
constexpr i64 KIN = 2 * MR;  // queries that share a mean key, see QueryGradient
// Multiply-adds below which a second thread costs more than it brings; where k and v are read once, memory counts.
constexpr i64 UNIT_WORK = 1 << 18, DIRECT_WORK = 1 << 14;
// Queries and keys in a block. BK x 64 floats, one operand of every product, stay in the first cache; the mean keys of
// BQ queries are one row of tiles.
constexpr i64 BQ = KIN * MR, BK = 96;
constexpr float NONE = -__builtin_inff();

static_assert(BK % MR == 0 && BK % NR == 0, "blocks are whole tiles");

struct Strides {
  i64 b, t, h;
};
struct Shape {
  i64 batch, heads, queries, keys, size;  // size: D
  i64 diagonal;
  float scale;
  i64 first_batch;  // of dropout's hash
  i64 width() const { return up(size, NR); }  // of a packed row
  template <class T>
  T* of_head(T* tensor, Strides strides, i64 head) const {
    return tensor + head / heads * strides.b + head % heads * strides.h;
  }
  // How many keys query i sees.
  i64 visible(i64 i) const { return clamp(i + diagonal + 1, 0, keys); }
};

// ---- building blocks -------------------------------------------------------------------------------

// exp for x <= 0 (or a little above), 0 below -87.7: vexp with 2^n as one factor and no care for large x.
GPT2FAST_INLINE vf exp_below(vf x) {
  constexpr float ROUND = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds to an integer; 127 is the exponent's bias
  const vf clamped = vmax(splat(-88.0f), x);     // this order keeps a NaN in x
  const vf shifted = clamped * 1.44269504f + ROUND;
  const vf n = shifted - ROUND;
  const vf r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-06f;
  vf p = splat(0.001381459878757596f);
  p = p * r + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * as_float(as_bits(shifted) << 23);
}

// C = A B over depth `size` in short sums, which round less than one long one: S and dP meet in differences. Without a
// fused multiply-add every step rounds twice, and the sums are shorter still.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr i64 SHORT = 64;
#else
constexpr i64 SHORT = 32;
#endif
GPT2FAST_INLINE void short_sums_tile(i64 size, const float* a, i64 a_stride, const float* b, float* c, i64 c_stride) {
  tile<false, false>(smaller(size, SHORT), a, a_stride, b, NR, c, c_stride, nullptr);
  for (i64 d = SHORT; d < size; d += SHORT)
    tile<false, true>(smaller(size - d, SHORT), a + d, a_stride, b + d * NR, NR, c, c_stride, nullptr);
}

// The largest lane and the sum of the lanes, in every lane (or one): shuffles, where hmax and hsum go to memory.
template <int W, int... I>
GPT2FAST_INLINE vf swapped(vf x, Lanes<I...>) {
  return GPT2FAST_SHUFFLE(x, x, (I ^ W));
}
template <int W = VL / 2>
GPT2FAST_INLINE vf lanes_max(vf x) {
  x = vmax(x, swapped<W>(x, typename MakeLanes<VL>::type()));
  if constexpr (W > 1) return lanes_max<W / 2>(x);
  else return x;
}
template <int W = VL / 2>
GPT2FAST_INLINE float lanes_sum(vf x) {
  x += swapped<W>(x, typename MakeLanes<VL>::type());
  if constexpr (W > 1) return lanes_sum<W / 2>(x);
  else return x[0];
}

// Rows that are wanted soon, one fetched beside each tile: a row of a head is too short a stream for the CPU to see.
class Fetch {
 public:
  template <class T>
  void add(const T* rows, i64 stride, i64 first, i64 last, i64 size) {
    constexpr i64 ELEMENT = sizeof(T);
    if (first < last)
      pieces[count++] = {(const char*)(rows + first * stride), stride * ELEMENT, size * ELEMENT, last - first};
  }
  void one() {
    if (next == count) return;
    Piece& piece = pieces[next];
    for (i64 b = 0; b < piece.bytes; b += 64) __builtin_prefetch(piece.row + b, 0, 2);
    piece.row += piece.stride;
    if (--piece.rows == 0) ++next;
  }

 private:
  struct Piece {
    const char* row;
    i64 stride, bytes, rows;
  } pieces[8];
  int count = 0, next = 0;
};

// Rows of `size` elements to rows of `width` floats, multiplied by factor, zero-padded in both directions.
template <class T>
static void pack_rows(const T* from, i64 stride, i64 rows, i64 size, float factor, float* to, i64 width,
                      i64 padded_rows) {
  for (i64 r = 0; r < rows; ++r) {
    const T* row = from + r * stride;
    float* out = to + r * width;
    i64 c = 0;
    for (; c + VL <= size; c += VL) store(out + c, load(row + c) * factor);
    for (; c < width; c += VL) store(out + c, load_n(row + c, clamp(size - c, 0, VL)) * factor);
  }
  for (i64 r = rows; r < padded_rows; ++r)
    for (i64 c = 0; c < width; c += VL) store(to + r * width + c, vf{});
}

// Scores of blocks: to (rows x BK) = A B, where row r wants its first seen(r) columns.
template <class Seen>
GPT2FAST_INLINE void score_block(const Seen& seen, i64 rows, i64 size, const float* a, i64 width, const float* panels,
                                 float* to, Fetch& fetch) {
  for (i64 r = 0; r < rows; r += MR)
    for (i64 c = 0, columns = seen(r + MR - 1); c < columns; c += NR) {
      fetch.one();
      short_sums_tile(size, a + r * width, width, panels + c * size, to + r * BK + c, BK);
    }
}

// to (rows x width) = factor * to + A B, with A (rows x BK) 0 past the first seen(r) columns of row r.
template <class Seen>
GPT2FAST_INLINE void add_block(const Seen& seen, i64 rows, const float* a, const float* b, float* to, i64 width,
                               const float* factor, Fetch& fetch) {
  for (i64 r = 0; r < rows; r += MR)
    if (const i64 depth = seen(r + MR - 1))
      for (i64 c = 0; c < width; c += NR) {
        fetch.one();
        tile<false, true>(depth, a + r * BK, BK, b + c, width, to + r * width + c, width,
                          factor ? factor + r : nullptr);
      }
}

template <class T>
static void store_rows(const float* from, i64 width, i64 rows, i64 size, float factor, T* to, i64 stride) {
  for (i64 r = 0; r < rows; ++r)
    for_columns(size, [&](i64 c, i64 n) {
      store_at(to + r * stride + c, load(from + r * width + c) * factor, n);
    });
}

static int share_limit(double work, i64 unit, int threads) {
  return work >= double(unit) * threads ? threads : int(work / unit) + 1;
}

// ---- forward ---------------------------------------------------------------------------------------

struct ForwardSpace {
  float *k, *v, *q, *scores, *out, *top, *sum, *factor;
  i64 floats;
  ForwardSpace(float* base, i64 keys, i64 size) {
    const i64 width = up(size, NR);
    Arena arena{base};
    k = arena.take(up(keys, NR) * size);
    v = arena.take(keys * width);
    q = arena.take(BQ * width);
    scores = arena.take(BQ * BK);
    out = arena.take(BQ * width);
    top = arena.take(BQ);
    sum = arena.take(BQ);
    factor = arena.take(BQ);
    floats = arena.next - base + 16;  // 16: shares on separate cache lines
  }
};

i64 attention_forward_workspace(i64 keys, i64 size, int threads) {
  return threads * ForwardSpace(nullptr, keys, size).floats;
}

// One row of scores of n visible keys from key j on: scores become P * exp(top), zero up to `end`.
template <bool DROP>
GPT2FAST_INLINE void softmax_row(float* s, i64 n, i64 end, float& top, float& sum, float& factor,
                                 const RandomRow& dropout, i64 j) {
  if (n <= 0) {
    factor = 1.0f;
    zero(s, end);
    return;
  }
  const i64 whole = n / VL * VL;
  const vi inside = (vi)(lane_index() < int32_t(n - whole));
  vf most = splat(top);
  for (i64 c = 0; c < whole; c += VL) most = vmax(most, load(s + c));
  if (whole < n) most = vmax(most, select(inside, load(s + whole), splat(NONE)));
  const vf now = lanes_max(most);
  factor = exp_below(top - now)[0];
  top = now[0];
  vf total = {};
  for (i64 c = 0; c < whole; c += VL) {
    const vf p = exp_below(load(s + c) - now);
    total += p;
    store(s + c, DROP ? select(dropout.keep(j + c), p, vf{}) : p);
  }
  i64 c = whole;
  if (c < n) {
    const vf p = select(inside, exp_below(load(s + c) - now), vf{});
    total += p;
    store(s + c, DROP ? select(dropout.keep(j + c), p, vf{}) : p);
    c += VL;
  }
  if (c < end) zero(s + c, end - c);
  sum = sum * factor + lanes_sum(total);
}

template <bool DROP>
static void attend_block(const Shape& shape, const ForwardSpace& space, i64 i0, i64 rows, const Dropout& dropout,
                         Fetch& fetch) {
  const i64 size = shape.size, width = shape.width(), keys = shape.visible(i0 + rows - 1);
  const i64 padded = up(rows, MR);
  zero(space.out, padded * width);
  for (i64 r = 0; r < padded; ++r) space.top[r] = NONE, space.sum[r] = 0.0f, space.factor[r] = 1.0f;
  for (i64 j0 = 0; j0 < keys; j0 += BK) {
    // Row r sees the first seen(r) keys of this block; a tile of rows works on those its last row sees.
    const auto seen = [&](i64 r) { return clamp(shape.visible(i0 + smaller(r, rows - 1)) - j0, 0, BK); };
    score_block(seen, padded, size, space.q, width, space.k + j0 * size, space.scores, fetch);
    for (i64 r0 = 0; r0 < padded; r0 += MR) {
      const i64 depth = seen(r0 + MR - 1);
      if (depth == 0) continue;
      for (i64 r = r0; r < r0 + MR; ++r)
        softmax_row<DROP>(space.scores + r * BK, r < rows ? seen(r) : 0, depth, space.top[r], space.sum[r],
                          space.factor[r], RandomRow(dropout, i0 + r), j0);
    }
    add_block(seen, padded, space.scores, space.v + j0 * width, space.out, width, space.factor, fetch);
  }
}

// top + log(sum), and what rounding it leaves out: at scores of 1000 that is 3e-5, and P = exp(S - lse) would be as
// wrong in every key of the row.
GPT2FAST_INLINE void put_lse(float* lse, float* rest, float top, float sum) {
  const float log_sum = sum == 0.0f ? 0.0f : logf(sum), total = top + log_sum;
  *lse = sum == 0.0f ? NONE : total;
  *rest = sum == 0.0f ? 0.0f : (top - total) + log_sum;
}

// N vectors of out += sum over keys of p * v, v in place.
template <int N, class T>
GPT2FAST_INLINE void direct_values(const float* p, const T* v, i64 stride, i64 keys, float* out, float factor) {
  vf sum[N];
#pragma GCC unroll 8
  for (int x = 0; x < N; ++x) sum[x] = load(out + x * VL) * factor;
  for (i64 j = 0; j < keys; ++j) {
    const vf weight = splat(p[j]);
#pragma GCC unroll 8
    for (int x = 0; x < N; ++x) sum[x] += weight * load(v + j * stride + x * VL);
  }
#pragma GCC unroll 8
  for (int x = 0; x < N; ++x) store(out + x * VL, sum[x]);
}

// One query, k and v in place; q is packed. Leaves the sum in space.out, top and sum in place 0.
template <class T, bool DROP>
static void attend_direct(const Shape& shape, const ForwardSpace& space, const float* q, const T* k, i64 k_t,
                          const T* v, i64 v_t, i64 i, const Dropout& dropout) {
  const i64 size = shape.size, keys = shape.visible(i), whole = size / VL * VL;
  const RandomRow row(dropout, i);
  zero(space.out, shape.width());
  space.top[0] = NONE, space.sum[0] = 0.0f;
  for (i64 j0 = 0; j0 < keys; j0 += BK) {
    const i64 count = smaller(BK, keys - j0);
    for (i64 j = 0; j < count; j += VL) {
      const T* rows[VL];  // past the end the last key stands in; softmax_row leaves it out
#pragma GCC unroll 16
      for (int x = 0; x < VL; ++x) rows[x] = k + (j0 + smaller(j + x, count - 1)) * k_t;
      vf sum[VL] = {};
      for (i64 d = 0; d < whole; d += VL) {
        const vf part = load(q + d);
#pragma GCC unroll 16
        for (int x = 0; x < VL; ++x) sum[x] += part * load(rows[x] + d);
      }
      if (whole < size)
        for (int x = 0; x < VL; ++x) sum[x] += load(q + whole) * load_n(rows[x] + whole, size - whole);
      transpose(sum);
      for (int step = VL / 2; step; step /= 2)
        for (int x = 0; x < step; ++x) sum[x] += sum[x + step];
      store(space.scores + j, sum[0]);
    }
    softmax_row<DROP>(space.scores, count, count, space.top[0], space.sum[0], space.factor[0], row, j0);
    const T* values = v + j0 * v_t;
    const float factor = space.factor[0];
    i64 d = 0;
    for (; d + 8 * VL <= size; d += 8 * VL)
      direct_values<8>(space.scores, values + d, v_t, count, space.out + d, factor);
    for (; d + 4 * VL <= size; d += 4 * VL)
      direct_values<4>(space.scores, values + d, v_t, count, space.out + d, factor);
    for (; d + VL <= size; d += VL)
      direct_values<1>(space.scores, values + d, v_t, count, space.out + d, factor);
    if (d < size) {
      vf sum = load(space.out + d) * factor;
      for (i64 j = 0; j < count; ++j) sum += space.scores[j] * load_n(values + j * v_t + d, size - d);
      store(space.out + d, sum);
    }
  }
}

template <class T>
static void forward(const T* q, Strides qs, const T* k, Strides ks, const T* v, Strides vs, T* out, Strides os,
                    float* lse, float* workspace, const Shape& shape, double dropout, i64 seed, int threads) {
  const i64 size = shape.size, width = shape.width(), queries = shape.queries;
  const i64 all_heads = shape.batch * shape.heads;
  if (all_heads == 0 || queries == 0) return;
  const bool direct = queries <= DIRECT;
  const i64 blocks = direct ? 1 : (queries + BQ - 1) / BQ;
  const auto cost = [&](i64 block) {  // in keys: what its last row sees, and some for the fixed work
    return shape.visible(smaller((block + 1) * BQ, queries) - 1) + 16;
  };
  i64 head_cost = 0;
  for (i64 block = 0; block < blocks; ++block) head_cost += cost(block);
  // Units are (head, block) in order; share t begins where t / shares of all cost lies before.
  const auto boundary = [&](i64 target) {
    i64 unit = target / head_cost * blocks, rest = target % head_cost;
    for (i64 block = 0; block < blocks && rest >= cost(block); ++block, ++unit) rest -= cost(block);
    return unit;
  };
  const int shares = share_limit(double(all_heads) * head_cost * smaller(queries, BQ) * size,
                                 direct ? DIRECT_WORK : UNIT_WORK, threads);
  parallel_shares(shares, 1, shares, [&](int, i64 begin, i64 end) {
    for (i64 share = begin; share < end; ++share) {
      ForwardSpace space(workspace, shape.keys, size);
      space = ForwardSpace(workspace + share * space.floats, shape.keys, size);
      const i64 first = boundary(all_heads * head_cost * share / shares);
      const i64 last = boundary(all_heads * head_cost * (share + 1) / shares);
      i64 packed = -1;
      for (i64 unit = first; unit < last; ++unit) {
        const i64 head = unit / blocks, block = unit % blocks;
        const Dropout drop = head_dropout(dropout, seed, shape.first_batch + head / shape.heads, head % shape.heads);
        const T *kh = shape.of_head(k, ks, head), *vh = shape.of_head(v, vs, head), *qh = shape.of_head(q, qs, head);
        T* oh = shape.of_head(out, os, head);
        float* lse_head = lse + head * queries;
        if (direct) {
          pack_rows(qh, qs.t, queries, size, shape.scale, space.q, width, queries);
          for (i64 i = 0; i < queries; ++i) {
            const auto run = dropout > 0 ? attend_direct<T, true> : attend_direct<T, false>;
            run(shape, space, space.q + i * width, kh, ks.t, vh, vs.t, i, drop);
            const float sum = space.sum[0];
            store_rows(space.out, width, 1, size, sum == 0.0f ? 0.0f : drop.keep / sum, oh + i * os.t, os.t);
            put_lse(lse_head + i, lse_head + all_heads * queries + i, space.top[0], sum);
          }
          continue;
        }
        if (head != packed) {
          const i64 final_unit = smaller(last, (head + 1) * blocks) - 1;
          const i64 seen = shape.visible(smaller((final_unit % blocks + 1) * BQ, queries) - 1);
          pack_transposed(kh, ks.t, seen, size, space.k);
          pack_rows(vh, vs.t, seen, size, 1.0f, space.v, width, seen);
          packed = head;
        }
        const i64 i0 = block * BQ, rows = smaller(BQ, queries - i0);
        pack_rows(qh + i0 * qs.t, qs.t, rows, size, shape.scale, space.q, width, up(rows, MR));
        const auto run = dropout > 0 ? attend_block<true> : attend_block<false>;
        Fetch fetch;
        fetch.add(oh, os.t, i0, i0 + rows, size);
        if ((head + 1) * blocks < last) {
          const i64 key_end = smaller(i0 + rows, shape.keys);
          fetch.add(shape.of_head(q, qs, head + 1), qs.t, i0, i0 + rows, size);
          fetch.add(shape.of_head(k, ks, head + 1), ks.t, i0, key_end, size);
          fetch.add(shape.of_head(v, vs, head + 1), vs.t, i0, key_end, size);
        }
        run(shape, space, i0, rows, drop, fetch);
        for (i64 r = 0; r < rows; ++r) {
          const float sum = space.sum[r];
          store_rows(space.out + r * width, width, 1, size, sum == 0.0f ? 0.0f : drop.keep / sum,
                     oh + (i0 + r) * os.t, os.t);
          put_lse(lse_head + i0 + r, lse_head + all_heads * queries + i0 + r, space.top[r], sum);
        }
      }
    }
  });
}

void attention_forward(uintptr_t q, i64 q_b, i64 q_t, i64 q_h, uintptr_t k, i64 k_b, i64 k_t, i64 k_h, uintptr_t v,
                       i64 v_b, i64 v_t, i64 v_h, uintptr_t out, i64 out_b, i64 out_t, i64 out_h, uintptr_t lse,
                       uintptr_t workspace, i64 batch, i64 heads, i64 queries, i64 keys, i64 size, i64 diagonal,
                       float scale, double dropout, i64 seed, i64 first_batch, int dtype, int threads) {
  const Shape shape{batch, heads, queries, keys, size, diagonal, scale, first_batch};
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    forward((const T*)q, {q_b, q_t, q_h}, (const T*)k, {k_b, k_t, k_h}, (const T*)v, {v_b, v_t, v_h}, (T*)out,
            {out_b, out_t, out_h}, (float*)lse, (float*)workspace, shape, dropout, seed, threads);
  });
}

// ---- backward --------------------------------------------------------------------------------------

// What the key blocks of a head add to, and its units after them. The rows of dS sum to 0 but for the rounding of delta,
// which dq would multiply by what keys have in common: `excess` is that sum for each query (0 for a row that is whole, see
// backward_row), `keys` the sum of P k over KIN queries, and dq loses excess times the mean of P k over these.
struct QueryGradient {
  float *dq, *excess, *keys;
  i64 floats;
  QueryGradient(float* base, i64 queries, i64 size) {
    const i64 width = up(size, NR), rows = up(queries, MR);
    Arena arena{base};
    dq = arena.take(rows * width);
    excess = arena.take(rows);
    keys = arena.take(((queries + KIN - 1) / KIN + MR) * width);
    floats = arena.next - base;
  }
};

struct BackwardSpace {
  float *q, *dout, *gradient, *delta, *k, *k_across, *v_across, *dk, *dv, *p, *ds, *weights;
  i64 floats;
  BackwardSpace(float* base, i64 queries, i64 size) {
    const i64 width = up(size, NR), rows = up(queries, MR);
    Arena arena{base};
    q = arena.take(rows * width);
    dout = arena.take(rows * width);
    gradient = arena.take(QueryGradient(nullptr, queries, size).floats);
    delta = arena.take(rows);
    k = arena.take(BK * width);
    k_across = arena.take(BK * size);
    v_across = arena.take(BK * size);
    dk = arena.take(BK * width);
    dv = arena.take(BK * width);
    p = arena.take(BQ * BK);
    ds = arena.take(BQ * BK);
    weights = arena.take(MR * BK);
    floats = arena.next - base + 16;
  }
};

// Into how many units a head is split: one where heads are many or divide evenly among the threads.
static i64 head_splits(i64 heads, i64 keys, int threads) {
  if (heads >= 4 * i64(threads) || heads % threads == 0 || heads == 0) return 1;
  return smaller((4 * i64(threads) + heads - 1) / heads, keys > BK ? (keys + BK - 1) / BK : 1);
}

i64 attention_backward_workspace(i64 heads, i64 queries, i64 keys, i64 size, int threads) {
  const i64 splits = head_splits(heads, keys, threads);
  const i64 parts = splits > 1 ? heads * splits * QueryGradient(nullptr, queries, size).floats : 0;
  return threads * BackwardSpace(nullptr, queries, size).floats + parts;
}

// One row: scores become (dropped) P, dp becomes dS; both are 0 past the n visible keys up to `end`. Adds P to `weights`
// and returns the sum of dS, which is 0 by construction where the row is whole.
//
// dP - delta cancels where few keys have weight. If all keys of the row are here (`whole`), delta is taken as
// sum(P dP), so that the rounding of dP cancels too; rowsum(dout out) is for longer rows only. There P = 1 means
// that the other keys weigh less than rounding does, and dS is 0. A whole row is also normalised anew: its scores
// may differ in bits from those of the forward's direct path.
template <bool DROP>
GPT2FAST_INLINE float backward_row(float* p, float* dp, float* weights, i64 n, i64 end, float lse, float rest,
                                   float delta, bool whole, float keep, const RandomRow& dropout, i64 j) {
  const i64 full = n / VL * VL;
  vf excess = {};
  const vi inside = (vi)(lane_index() < int32_t(n - full));
  if (whole) {
    vf products = {}, total = {};
    const auto step = [&](i64 c, bool partial) {
      vf x = exp_below((load(p + c) - lse) - rest), d = load(dp + c);
      if (DROP) d = select(dropout.keep(j + c), d * keep, vf{});
      if (partial) x = select(inside, x, vf{}), d = select(inside, d, vf{});
      products += x * d;
      total += x;
      store(p + c, x);
      if (DROP || partial) store(dp + c, d);
    };
    for (i64 c = 0; c < full; c += VL) step(c, false);
    if (full < n) step(full, true);
    const float share = 1.0f / lanes_sum(total), sum = lanes_sum(products) * share;
    for (i64 c = 0; c < n; c += VL) {
      const vf x = load(p + c) * share;
      store(weights + c, load(weights + c) + x);
      store(dp + c, n == 1 ? vf{} : x * (load(dp + c) - sum));
      store(p + c, DROP ? select(dropout.keep(j + c), x, vf{}) : x);
    }
  } else {
    const auto step = [&](i64 c, bool partial) {
      vf x = exp_below((load(p + c) - lse) - rest), d = load(dp + c);
      if (partial) x = select(inside, x, vf{}), d = select(inside, d, vf{});
      const vi kept = DROP ? dropout.keep(j + c) : vi{};
      if (DROP) d = select(kept, d * keep, vf{});
      const vf s = select(x == 1.0f, vf{}, x * (d - delta));
      excess += s;
      store(weights + c, load(weights + c) + x);
      store(p + c, DROP ? select(kept, x, vf{}) : x);
      store(dp + c, s);
    };
    for (i64 c = 0; c < full; c += VL) step(c, false);
    if (full < n) step(full, true);
  }
  const i64 c = up(n, VL);
  if (c < end) {
    zero(p + c, end - c);
    zero(dp + c, end - c);
  }
  return lanes_sum(excess);
}

template <bool DROP>
static void backward_block(const Shape& shape, const BackwardSpace& space, const QueryGradient& gradient,
                           const float* lse, const float* rests, i64 j0, const Dropout& dropout, Fetch& fetch) {
  const i64 size = shape.size, width = shape.width(), count = smaller(BK, shape.keys - j0);
  const i64 begin = clamp(j0 - shape.diagonal, 0, shape.queries) / BQ * BQ;  // before the first query that sees j0
  if (begin == shape.queries) {  // else the first block of queries writes, where others add
    zero(space.dk, up(count, MR) * width);
    zero(space.dv, up(count, MR) * width);
  }
  for (i64 i0 = begin; i0 < shape.queries; i0 += BQ) {
    const i64 rows = smaller(BQ, shape.queries - i0), padded = up(rows, MR);
    const auto seen = [&](i64 r) { return clamp(shape.visible(i0 + smaller(r, rows - 1)) - j0, 0, count); };
    const float *q = space.q + i0 * width, *dout = space.dout + i0 * width;
    score_block(seen, padded, size, q, width, space.k_across, space.p, fetch);
    score_block(seen, padded, size, dout, width, space.v_across, space.ds, fetch);
    zero(space.weights, MR * BK);
    for (i64 r = 0; r < padded; ++r) {
      const bool real = r < rows;
      const i64 tile_end = up(seen(r / MR * MR + MR - 1), MR);  // products read no further
      gradient.excess[i0 + r] += backward_row<DROP>(
          space.p + r * BK, space.ds + r * BK, space.weights + r / KIN * BK, real ? seen(r) : 0, tile_end,
          real ? lse[i0 + r] : 0.0f, real ? rests[i0 + r] : 0.0f, real ? space.delta[i0 + r] : 0.0f,
          j0 == 0 && shape.visible(i0 + (real ? r : 0)) <= BK, dropout.keep, RandomRow(dropout, i0 + r), j0);
    }
    if (shape.visible(i0 + rows - 1) > BK)  // or all rows are whole
      for (i64 c = 0; c < width; c += NR)
        tile<false, true>(count, space.weights, BK, space.k + c, width, gradient.keys + i0 / KIN * width + c, width,
                          nullptr);
    const auto add_across = [&](const float* a, const float* b, float* to) {
      for (i64 m = 0; m < count; m += MR) {
        const i64 start = clamp(j0 + m - shape.diagonal - i0, 0, rows);
        if (start == rows && i0 > begin) return;
        for (i64 c = 0; c < width; c += NR) {
          fetch.one();
          (i0 > begin ? tile<true, true> : tile<true, false>)(rows - start, a + start * BK + m, BK,
                                                              b + start * width + c, width, to + m * width + c, width,
                                                              nullptr);
        }
      }
    };
    add_across(space.p, dout, space.dv);
    add_across(space.ds, q, space.dk);
    add_block(seen, padded, space.ds, space.k, gradient.dq + i0 * width, width, nullptr, fetch);
  }
}

// dq without its excess, to `to`. Where a mean key is not finite it is left as it is.
template <class T>
static void store_dq(const Shape& shape, const QueryGradient& gradient, T* to, i64 stride) {
  const i64 width = shape.width();
  for (i64 i = 0; i < shape.queries; ++i) {
    const i64 i0 = i / KIN * KIN, last = smaller(i0 + KIN, shape.queries) - 1;
    const i64 seeing = last - clamp(-shape.diagonal, i0, last + 1) + 1;  // of the KIN queries, those that see a key
    const float* keys = gradient.keys + i / KIN * width;
    float* row = gradient.dq + i * width;
    const float excess = seeing > 0 ? gradient.excess[i] / seeing : 0.0f;
    for (i64 c = 0; excess != 0.0f && c < width; c += VL) {
      const vf part = load(keys + c) * excess;
      store(row + c, load(row + c) - select(part - part == 0.0f, part, vf{}));
    }
    store_rows(row, width, 1, shape.size, shape.scale, to + i * stride, stride);
  }
}

template <class T>
static void row_products(const float* dout, i64 width, const T* out, i64 stride, i64 rows, i64 size, float* delta) {
  for (i64 r = 0; r < rows; ++r) {
    vf sum = {};
    for_columns(size, [&](i64 c, i64 n) { sum += load(dout + r * width + c) * load_at(out + r * stride + c, n); });
    delta[r] = lanes_sum(sum);
  }
}

template <class T>
static void backward(const T* dout, Strides dos, const T* q, Strides qs, const T* k, Strides ks, const T* v,
                     Strides vs, const T* out, Strides os, const float* lse, T* dq, Strides dqs, T* dk, Strides dks,
                     T* dv, Strides dvs, float* workspace, const Shape& shape, double dropout, i64 seed, int threads) {
  const i64 size = shape.size, width = shape.width(), queries = shape.queries, keys = shape.keys;
  const i64 all_heads = shape.batch * shape.heads, blocks = (keys + BK - 1) / BK;
  const i64 splits = head_splits(all_heads, keys, threads), rows = up(queries, MR);
  const i64 floats = BackwardSpace(nullptr, queries, size).floats;
  const i64 part = QueryGradient(nullptr, queries, size).floats;
  float* parts = workspace + threads * floats;
  const int shares = share_limit(double(all_heads) * keys * queries * size, UNIT_WORK, threads);
  parallel_shares(all_heads * splits, 1, shares, [&](int share, i64 begin, i64 end) {
    BackwardSpace space(workspace + share * floats, queries, size);
    i64 packed = -1;
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 head = unit / splits;
      T *dqh = shape.of_head(dq, dqs, head), *dkh = shape.of_head(dk, dks, head), *dvh = shape.of_head(dv, dvs, head);
      const Dropout drop = head_dropout(dropout, seed, shape.first_batch + head / shape.heads, head % shape.heads);
      const QueryGradient gradient(splits > 1 ? parts + unit * part : space.gradient, queries, size);
      zero(gradient.dq, part);
      if (head != packed) {
        pack_rows(shape.of_head(q, qs, head), qs.t, queries, size, shape.scale, space.q, width, rows);
        pack_rows(shape.of_head(dout, dos, head), dos.t, queries, size, 1.0f, space.dout, width, rows);
        row_products(space.dout, width, shape.of_head(out, os, head), os.t, queries, size, space.delta);
        packed = head;
      }
      for (i64 block = unit % splits; block < blocks; block += splits) {
        const i64 j0 = block * BK, count = smaller(BK, keys - j0);
        const T *kh = shape.of_head(k, ks, head) + j0 * ks.t, *vh = shape.of_head(v, vs, head) + j0 * vs.t;
        pack_rows(kh, ks.t, count, size, 1.0f, space.k, width, count);
        pack_transposed(kh, ks.t, count, size, space.k_across);
        pack_transposed(vh, vs.t, count, size, space.v_across);
        const auto run = dropout > 0 ? backward_block<true> : backward_block<false>;
        Fetch fetch;
        const i64 query_end = smaller(j0 + count, queries);
        fetch.add(dkh, dks.t, j0, j0 + count, size);
        fetch.add(dvh, dvs.t, j0, j0 + count, size);
        fetch.add(dqh, dqs.t, j0, query_end, size);
        if (head + 1 < all_heads) {
          fetch.add(shape.of_head(q, qs, head + 1), qs.t, j0, query_end, size);
          fetch.add(shape.of_head(dout, dos, head + 1), dos.t, j0, query_end, size);
          fetch.add(shape.of_head(out, os, head + 1), os.t, j0, query_end, size);
          fetch.add(shape.of_head(k, ks, head + 1), ks.t, j0, j0 + count, size);
          fetch.add(shape.of_head(v, vs, head + 1), vs.t, j0, j0 + count, size);
        }
        run(shape, space, gradient, lse + head * queries, lse + (all_heads + head) * queries, j0, drop, fetch);
        store_rows(space.dk, width, count, size, 1.0f, dkh + j0 * dks.t, dks.t);
        store_rows(space.dv, width, count, size, drop.keep, dvh + j0 * dvs.t, dvs.t);
      }
      if (splits == 1) store_dq(shape, gradient, dqh, dqs.t);
    }
  });
  if (splits == 1) return;
  parallel_shares(all_heads, 1, shares, [&](int, i64 begin, i64 end) {
    for (i64 head = begin; head < end; ++head) {
      float* first = parts + head * splits * part;
      for (i64 s = 1; s < splits; ++s)
        for (i64 c = 0; c < part; c += VL) store(first + c, load(first + c) + load(first + s * part + c));
      store_dq(shape, QueryGradient(first, queries, size), shape.of_head(dq, dqs, head), dqs.t);
    }
  });
}

void attention_backward(uintptr_t dout, i64 dout_b, i64 dout_t, i64 dout_h, uintptr_t q, i64 q_b, i64 q_t, i64 q_h,
                        uintptr_t k, i64 k_b, i64 k_t, i64 k_h, uintptr_t v, i64 v_b, i64 v_t, i64 v_h, uintptr_t out,
                        i64 out_b, i64 out_t, i64 out_h, uintptr_t lse, uintptr_t dq, i64 dq_b, i64 dq_t, i64 dq_h,
                        uintptr_t dk, i64 dk_b, i64 dk_t, i64 dk_h, uintptr_t dv, i64 dv_b, i64 dv_t, i64 dv_h,
                        uintptr_t workspace, i64 batch, i64 heads, i64 queries, i64 keys, i64 size, i64 diagonal,
                        float scale, double dropout, i64 seed, i64 first_batch, int dtype, int threads) {
  const Shape shape{batch, heads, queries, keys, size, diagonal, scale, first_batch};
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    backward((const T*)dout, {dout_b, dout_t, dout_h}, (const T*)q, {q_b, q_t, q_h}, (const T*)k, {k_b, k_t, k_h},
             (const T*)v, {v_b, v_t, v_h}, (const T*)out, {out_b, out_t, out_h}, (const float*)lse, (T*)dq,
             {dq_b, dq_t, dq_h}, (T*)dk, {dk_b, dk_t, dk_h}, (T*)dv, {dv_b, dv_t, dv_h}, (float*)workspace, shape,
             dropout, seed, threads);
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

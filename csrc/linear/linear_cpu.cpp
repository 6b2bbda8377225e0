// The matrix products of a linear layer in fp32.
//
//   computes  C = A B, or C + A B; a bias may be added to every row of C.
//   layout    C (rows x columns) and A (rows x depth), B (depth x columns), each row-major with any row stride, or
//             A or B `across`: its transpose is. Both across is not served.
//                 y = x W^T        B across           forward
//                 dx = dy W        neither            input's gradient
//                 dW = dy^T x      A across           weight's gradient
//   source    Goto and van de Geijn 2008 (blocks by cache level); what is new against a BLAS is only which operand goes
//             where. The big packed block has to be used often to pay; with some hundred rows a weight is used a few
//             dozen times. So there the block is made of x, and weights are packed by small groups, as they are met: y
//             is computed as its transpose, and turned when stored. With more rows than depth it is not worth it.
//   moves     a weight once from memory for 256 rows of x; 2 rows columns depth operations.
//   work      The broadcast side (`length`: columns of C where it is turned, else rows) goes in groups of at most GROUP; units
//             are (block of the packed side, group) in order, shared out evenly. A thread packs its own blocks.
//             Sums run over DEPTH numbers, then over those sums in order: the same bits for any number of threads.
#include "common/tile.h"

#include "decode/decode_cpu.h"
#include "linear/linear_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 GROUP = 96, GROUP_STEP = VL == 16 ? 16 : 24, DEPTH = 256;
static_assert(GROUP % GROUP_STEP == 0 && GROUP_STEP % MR == 0 && GROUP_STEP % VL == 0, "groups are whole tiles");

// Whether C is computed as its transpose.
static bool turned(i64 rows, i64 depth, bool b_across) { return b_across && rows <= depth; }

// Multiplications below which a second thread costs more than it brings.
constexpr i64 PRODUCT_GRAIN = 1 << 18;
static int useful_threads(i64 rows, i64 columns, i64 depth, int threads) {
  const i64 useful = 1 + rows * columns * depth / PRODUCT_GRAIN;
  return useful < threads ? int(useful) : threads;
}

struct Blocks {
  i64 packed;  // columns of the packed side in a block: these times DEPTH stay in the second cache
  i64 depth;   // of the packed block
  Blocks(bool a_across, bool turn, i64 columns, i64 whole, int threads) {
    packed = a_across ? 1024 : 256;
    depth = turn ? whole : smaller(whole, DEPTH);
    if (!a_across && !turn) {  // weights are the packed side: as many blocks for each thread
      const i64 blocks = (columns + 384 * threads - 1) / (384 * threads) * threads;
      packed = up((columns + blocks - 1) / blocks, NR);
    }
  }
};

// The size of groups of the broadcast side: GROUP, or less, so that units come out even for few of them.
static i64 group_size(i64 length, i64 blocks, int threads) {
  i64 groups = (length + GROUP - 1) / GROUP;
  if (blocks * groups >= 8 * threads) return GROUP;
  while (blocks * groups % threads) ++groups;
  return smaller(GROUP, up((length + groups - 1) / groups, GROUP_STEP));
}

struct MatmulSpace {
  float *panels, *group, *out;
  i64 floats;
  MatmulSpace(float* base, const Blocks& blocks, i64 packed) {
    const i64 width = up(smaller(blocks.packed, packed), NR);
    Arena arena{base};
    panels = arena.take(width * blocks.depth);
    group = arena.take(GROUP * DEPTH + VL);
    out = arena.take(GROUP * (width + 16));
    floats = arena.next - base + 16;
  }
};

// ---- few rows of activations --------------------------------------------------------------------------
//
// Then the time is that of reading or writing the weights once, and packing would take as long again.
//   y = x W^T     is the decoder's product (csrc/decode), up to FEW_ACROSS rows.
//   dx = dy W     up to FEW rows: bands of BAND rows of B meet all rows of A, sums over DEPTH numbers stay in the second
//                 cache, and threads have columns of their own, so that their number does not change bits.
//   dW = dy^T x   up to FEW rows: rows of C are written as they come, from B in the first cache.

constexpr i64 FEW = 6, FEW_ACROSS = 64, BAND = 8;
static_assert(DEPTH % BAND == 0, "sums are whole bands");

static bool is_few(i64 rows, bool a_across, bool b_across) {
  return !a_across && rows <= (b_across ? FEW_ACROSS : FEW);
}

struct FewSpace {
  float *a, *sums, *tail;
  i64 floats;
  FewSpace(float* base, i64 columns, i64 depth) {
    Arena arena{base};
    a = arena.take(FEW * depth);
    sums = arena.take(FEW * up(columns, NR));
    tail = arena.take(BAND * NR);
    floats = arena.next - base;
  }
};

i64 matmul_workspace(i64 rows, i64 columns, i64 depth, bool a_across, bool b_across, int threads) {
  const bool turn = turned(rows, depth, b_across);
  i64 few = 0;
  if (is_few(rows, a_across, b_across))
    few = larger(few_rows_workspace(rows, depth), FewSpace(nullptr, columns, depth).floats);
  threads = useful_threads(rows, columns, depth, threads);
  const Blocks blocks(a_across, turn, columns, depth, threads);
  return larger(few, threads * MatmulSpace(nullptr, blocks, turn ? rows : columns).floats);
}

// Columns of `depth` rows to panels of NR, zero-padded: to[panel][d][NR].
static void pack_columns(const float* from, i64 stride, i64 depth, i64 columns, float* to) {
  for (i64 c = 0; c < columns; c += NR)
    for (i64 d = 0; d < depth; ++d, to += NR) {
      const float* row = from + d * stride + c;
      if (c + NR <= columns)
        for (int x = 0; x < NR; x += VL) store(to + x, load(row + x));
      else
        for (int x = 0; x < NR; x += VL) store(to + x, load_at(row + x, clamp(columns - c - x, 0, VL)));
    }
}

// The broadcast side goes to tiles: to[tile][d][MR], missing rows as 0. Whole vectors are stored, of which the next store
// overwrites what is not its own; so VL numbers more are written.
static void pack_rows_to_tiles(const float* from, i64 stride, i64 count, i64 depth, float* to) {
  for (i64 r = 0; r < count; r += MR, to += MR * depth) {
    const i64 n = smaller(MR, count - r);
    for (i64 d = 0; d < depth; d += VL) {
      const i64 m = smaller(VL, depth - d);
      if constexpr (VL < MR) {
        for (i64 i = 0; i < m; ++i)
          for (i64 x = 0; x < MR; ++x) to[(d + i) * MR + x] = x < n ? from[(r + x) * stride + d + i] : 0.0f;
      } else {
        vf x[VL] = {};
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
          if (i < n) x[i] = load_at(from + (r + i) * stride + d, m);
        transpose(x);
        for (i64 i = 0; i < m; ++i) store(to + (d + i) * MR, x[i]);
      }
    }
  }
}
static void pack_columns_to_tiles(const float* from, i64 stride, i64 count, i64 depth, float* to) {
  for (i64 d = 0; d < depth; ++d, from += stride)
    for (i64 r = 0; r < count; r += MR)
      for (i64 x = 0; x < MR; x += VL)  // the last one of a tile may not reach into the next, which is begun
        store_at(to + r * depth + d * MR + x, load_at(from + r + x, clamp(count - r - x, 0, VL)),
                 d + 1 < depth ? VL : smaller(VL, MR - x));
}

// The transpose of (count x columns) with a bias for each of the count, stored or added.
static void store_turned(const float* from, i64 stride, i64 count, i64 columns, const float* bias, bool add, float* to,
                         i64 to_stride) {
  for (i64 c = 0; c < columns; c += VL)
    for (i64 r = 0; r < count; r += VL) {
      const i64 n = smaller(VL, count - r), m = smaller(VL, columns - c);
      const vf b = bias ? load_at(bias + r, n) : vf{};
      vf x[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) x[i] = load(from + (r + i) * stride + c);
      transpose(x);
      for (i64 i = 0; i < m; ++i) {
        float* row = to + (c + i) * to_stride + r;
        store_at(row, x[i] + b + (add ? load_at(row, n) : vf{}), n);
      }
    }
}

// A tile of which count x columns are in C, stored or added.
static void edge_tile(i64 depth, const float* a, const float* b, float* c, i64 c_stride, i64 count, i64 columns,
                      bool add) {
  float part[MR * NR];
  tile<true, false>(depth, a, MR, b, NR, part, NR, nullptr);
  for (i64 r = 0; r < count; ++r)
    for_columns(columns, [&](i64 x, i64 n) {
      float* place = c + r * c_stride + x;
      store_at(place, load(part + r * NR + x) + (add ? load_at(place, n) : vf{}), n);
    });
}

// A group of packed tiles times packed panels, stored or added to c. Places that are written next are
// fetched beside it: those of c, or of `turned` to which c goes as its transpose.
static void multiply_group(i64 depth, const float* a, i64 count, const float* panels, i64 columns, float* c,
                           i64 c_stride, bool add, float* turned, i64 turned_stride) {
  for (i64 x = 0; x < columns; x += NR, panels += depth * NR)
    for (i64 r = 0; r < count; r += MR) {
      float* to = c + r * c_stride + x;
      if (turned)
        for (i64 i = r / MR; i < NR && x + i < columns; i += (count + MR - 1) / MR)
          for (i64 j = 0; j < count; j += 16) __builtin_prefetch(turned + (x + i) * turned_stride + j, 1, 2);
      else
        for (int i = 0; i < MR; ++i) __builtin_prefetch(to + i * c_stride, 1, 3);
      if (r + MR > count || x + NR > columns)
        edge_tile(depth, a + r * depth, panels, to, c_stride, smaller(MR, count - r), smaller(NR, columns - x), add);
      else
        (add ? tile<true, true> : tile<true, false>)(depth, a + r * depth, MR, panels, NR, to, c_stride, nullptr);
    }
}

static void add_to_rows(float* c, i64 stride, i64 rows, i64 columns, const float* bias) {
  for (i64 r = 0; r < rows; ++r)
    for_columns(columns, [&](i64 x, i64 n) {
      float* place = c + r * stride + x;
      store_at(place, load_at(place, n) + load_at(bias + x, n), n);
    });
}

// C (R x columns) = or += A B on a band of B; columns in whole NR.
template <int R>
static void few_rows_band(i64 depth, const float* a, i64 a_stride, const float* b, i64 b_stride, float* c,
                          i64 c_stride, i64 columns, bool add) {
  for (i64 x = 0; x < columns; x += NR, b += NR, c += NR) {
    vf sum[R][NV] = {};
    for (i64 k = 0; k < depth; ++k) {
      const vf first = load(b + k * b_stride), second = load(b + k * b_stride + VL);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        sum[r][0] += splat(a[r * a_stride + k]) * first;
        sum[r][1] += splat(a[r * a_stride + k]) * second;
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) {
        float* place = c + r * c_stride + v * VL;
        store(place, add ? load(place) + sum[r][v] : sum[r][v]);
      }
  }
}

static void few_rows_input(const float* a, i64 a_stride, const float* b, i64 b_stride, float* c, i64 c_stride,
                           const float* bias, float* workspace, i64 rows, i64 columns, i64 depth, bool add,
                           int threads) {
  const FewSpace space(workspace, columns, depth);
  const i64 width = up(columns, NR), whole = columns / NR * NR;
  const auto run = rows == 1   ? few_rows_band<1>
                   : rows == 2 ? few_rows_band<2>
                   : rows <= 4 ? few_rows_band<4>
                               : few_rows_band<FEW>;
  for (i64 r = 0; r < FEW; ++r)
    for_columns(depth, [&](i64 k, i64 n) {
      store_at(space.a + r * depth + k, r < rows ? load_at(a + r * a_stride + k, n) : vf{}, n);
    });
  parallel_shares(width, 4 * NR, threads, [&](int, i64 begin, i64 end) {
    const i64 stop_whole = smaller(end, whole);
    for (i64 start = 0; start < depth; start += DEPTH) {
      const i64 stop = smaller(start + DEPTH, depth);
      for (i64 k = start; k < stop; k += BAND) {
        const i64 deep = smaller(BAND, stop - k);
        run(deep, space.a + k, depth, b + k * b_stride + begin, b_stride, space.sums + begin, width,
            stop_whole - begin, k > start);
        if (end <= whole) continue;
        for (i64 i = 0; i < deep; ++i)  // the last columns, padded
          for (int v = 0; v < NR; v += VL)
            store(space.tail + i * NR + v,
                  load_at(b + (k + i) * b_stride + whole + v, clamp(columns - whole - v, 0, VL)));
        run(deep, space.a + k, depth, space.tail, NR, space.sums + whole, width, NR, k > start);
      }
      for (i64 r = 0; r < rows; ++r)
        for (i64 x = begin; x < end; x += VL) {
          const i64 n = clamp(columns - x, 0, VL);
          float* place = c + r * c_stride + x;
          vf sum = load(space.sums + r * width + x);
          if (add || start > 0) sum += load_at(place, n);
          if (bias && stop == depth) sum += load_at(bias + x, n);
          store_at(place, sum, n);
        }
    }
  });
}

// C from A's transpose (depth x rows), depth up to FEW; one row of C at a time is one stream to memory.
static void few_rows_weight(const float* a, i64 a_stride, const float* b, i64 b_stride, float* c, i64 c_stride,
                            const float* bias, i64 rows, i64 columns, i64 depth, bool add, int threads) {
  parallel_shares(rows, 1, threads, [&](int, i64 begin, i64 end) {
    for (i64 r = begin; r < end; ++r) {
      vf factors[FEW];
      for (i64 k = 0; k < depth; ++k) factors[k] = splat(a[k * a_stride + r]);
      float* row = c + r * c_stride;
      for_columns(columns, [&](i64 x, i64 n) {
        vf sum{};
        for (i64 k = 0; k < depth; ++k) sum += factors[k] * load_at(b + k * b_stride + x, n);
        if (add) sum += load_at(row + x, n);
        if (bias) sum += load_at(bias + x, n);
        store_at(row + x, sum, n);
      });
    }
  });
}

void matmul(uintptr_t a, i64 a_stride, bool a_across, uintptr_t b, i64 b_stride, bool b_across, uintptr_t c,
            i64 c_stride, uintptr_t bias, uintptr_t workspace, i64 rows, i64 columns, i64 depth, bool add,
            int threads) {
  if (is_few(rows, a_across, b_across)) {
    if (!b_across)
      return few_rows_input((const float*)a, a_stride, (const float*)b, b_stride, (float*)c, c_stride,
                            (const float*)bias, (float*)workspace, rows, columns, depth, add,
                            useful_threads(rows, columns, depth, threads));
    if (!add && (rows == 1 || (a_stride == depth && c_stride == columns)) && (columns == 1 || b_stride == depth))
      return few_rows_linear(a, b, 0, bias, c, workspace, rows, depth, columns, 0, threads);
  }
  if (a_across && depth <= FEW)
    return few_rows_weight((const float*)a, a_stride, (const float*)b, b_stride, (float*)c, c_stride,
                           (const float*)bias, rows, columns, depth, add,
                           useful_threads(rows, columns, depth, threads));
  // S: the broadcast side (length x depth, or across); P: the packed one.
  const bool turn = turned(rows, depth, b_across);
  threads = useful_threads(rows, columns, depth, threads);
  const float *s = (const float*)(turn ? b : a), *p = (const float*)(turn ? a : b);
  const i64 s_stride = turn ? b_stride : a_stride, p_stride = turn ? a_stride : b_stride;
  const i64 length = turn ? columns : rows, packed = turn ? rows : columns;
  const Blocks blocks(a_across, turn, columns, depth, threads);
  const i64 all = (packed + blocks.packed - 1) / blocks.packed;
  const i64 group = group_size(length, all, threads), groups = (length + group - 1) / group;
  const i64 floats = MatmulSpace(nullptr, blocks, packed).floats;
  parallel_shares(all * groups, 1, threads, [&](int share, i64 begin, i64 end) {
    const MatmulSpace space((float*)workspace + share * floats, blocks, packed);
    for (i64 unit = begin; unit < end;) {
      const i64 block = unit / groups, last = smaller(end, (block + 1) * groups);
      const i64 p0 = block * blocks.packed, width = smaller(blocks.packed, packed - p0), wide = up(width, NR);
      for (i64 start = 0; start < depth; start += blocks.depth) {
        const i64 deep = smaller(blocks.depth, depth - start);
        for (i64 k0 = 0; k0 < deep; k0 += DEPTH) {
          const i64 kept = smaller(DEPTH, deep - k0);
          if (b_across)
            pack_transposed(p + p0 * p_stride + start + k0, p_stride, width, kept, space.panels + k0 * wide);
          else
            pack_columns(p + (start + k0) * p_stride + p0, p_stride, kept, width, space.panels + k0 * wide);
        }
        for (i64 g = unit - block * groups; g < last - block * groups; ++g) {
          const i64 r0 = g * group, count = smaller(group, length - r0);
          const bool more = add || start > 0;
          float* place = (float*)c + (turn ? p0 * c_stride + r0 : r0 * c_stride + p0);
          for (i64 k0 = 0; k0 < deep; k0 += DEPTH) {
            const i64 kept = smaller(DEPTH, deep - k0);
            const float* panels = space.panels + k0 * wide;
            if (a_across)
              pack_columns_to_tiles(s + (start + k0) * s_stride + r0, s_stride, count, kept, space.group);
            else
              pack_rows_to_tiles(s + r0 * s_stride + start + k0, s_stride, count, kept, space.group);
            if (turn)
              multiply_group(kept, space.group, count, panels, wide, space.out, wide + 16, k0 > 0,
                             k0 + DEPTH < deep ? nullptr : place, c_stride);
            else
              multiply_group(kept, space.group, count, panels, width, place, c_stride, more, nullptr, 0);
          }
          if (turn)
            store_turned(space.out, wide + 16, count, width, bias ? (const float*)bias + r0 : nullptr, more, place,
                         c_stride);
          else if (bias && start + deep == depth)
            add_to_rows(place, c_stride, count, width, (const float*)bias + p0);
        }
      }
      unit = last;
    }
  });
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

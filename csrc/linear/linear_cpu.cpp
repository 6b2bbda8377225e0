// The matrix products of a linear layer in fp32, for as few rows as a training step on a CPU has.
//
//   computes  C = A B, or C + A B; a bias may be added to every row of C.
//   layout    C (rows x columns) and A (rows x depth), B (depth x columns), each row-major with any row stride, or
//             A or B `across`: its transpose is. Both across is not served.
//                 y = x W^T        B across           forward
//                 dx = dy W        neither            input's gradient
//                 dW = dy^T x      A across           weight's gradient
//   source    Goto and van de Geijn 2008 (blocks by cache level); what is new against a BLAS is only which operand is
//             packed. With some hundred rows a packed weight is used a few dozen times and its packing costs 10%.
//             Here weights are read in place, number by number, as the side that is broadcast; the packed side, which
//             is read in vectors, is the small one. So y is computed as its transpose, and turned when stored.
//   moves     a weight once from memory for 256 rows of x; 2 rows columns depth operations.
//   work      The broadcast side's rows (`long`: columns of C where B is across, else rows) go in groups of GROUP; units
//             are (block of the packed side, group) in order, shared out evenly. A thread packs its own blocks.
//             Sums run over DEPTH numbers, then over those sums in order: the same bits for any number of threads.
#include "common/tile.h"

#include "linear/linear_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

constexpr i64 GROUP = 48, DEPTH = 256;
static_assert(GROUP % MR == 0 && GROUP % VL == 0, "groups are whole tiles");

struct Blocks {
  i64 packed;  // columns of the packed side in a block: these times `depth` stay in the cache that they are read from
  i64 depth;   // of the packed block
  Blocks(bool a_across, bool b_across, i64 whole) {
    packed = b_across ? 256 : a_across ? 1024 : 64;
    depth = b_across ? whole : a_across ? smaller(whole, 1024) : smaller(whole, DEPTH);
  }
};

struct MatmulSpace {
  float *panels, *group, *out;
  i64 floats;
  MatmulSpace(float* base, const Blocks& blocks, i64 packed) {
    const i64 width = up(smaller(blocks.packed, packed), NR);
    Arena arena{base};
    panels = arena.take(width * blocks.depth);
    group = arena.take(GROUP * DEPTH);
    out = arena.take(GROUP * width);
    floats = arena.next - base + 16;
  }
};

i64 matmul_workspace(i64 rows, i64 columns, i64 depth, bool a_across, bool b_across, int threads) {
  const Blocks blocks(a_across, b_across, depth);
  return threads * MatmulSpace(nullptr, blocks, b_across ? rows : columns).floats;
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

// The transpose of (depth x count), count <= GROUP, in tiles: to[tile][d][MR]; missing rows are 0.
static void pack_across(const float* from, i64 stride, i64 depth, i64 count, float* to) {
  for (i64 r = 0; r < count; r += MR)
    for (i64 d = 0; d < depth; ++d)
      for (int x = 0; x < MR; ++x) *to++ = r + x < count ? from[d * stride + r + x] : 0.0f;
}

// The transpose of (count x columns) with a bias for each of the count, stored or added.
static void store_turned(const float* from, i64 stride, i64 count, i64 columns, const float* bias, bool add, float* to,
                         i64 to_stride) {
  for (i64 r = 0; r < count; r += VL) {
    const i64 n = smaller(VL, count - r);
    const vf b = bias ? load_at(bias + r, n) : vf{};
    for (i64 c = 0; c < columns; c += VL) {
      vf x[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) x[i] = load(from + (r + i) * stride + c);
      transpose(x);
      const i64 m = smaller(VL, columns - c);
      for (i64 i = 0; i < m; ++i) {
        float* row = to + (c + i) * to_stride + r;
        store_at(row, x[i] + b + (add ? load_at(row, n) : vf{}), n);
      }
    }
  }
}

// A tile of which count x columns are in C, stored or added.
template <bool ACROSS>
static void edge_tile(i64 depth, const float* a, i64 a_stride, const float* b, float* c, i64 c_stride, i64 count,
                      i64 columns, bool add) {
  float part[MR * NR];
  tile<ACROSS, false>(depth, a, a_stride, b, NR, part, NR, nullptr);
  for (i64 r = 0; r < count; ++r)
    for_columns(columns, [&](i64 x, i64 n) {
      float* place = c + r * c_stride + x;
      store_at(place, load(part + r * NR + x) + (add ? load_at(place, n) : vf{}), n);
    });
}

// A group of the broadcast side times packed panels, stored or added to c. `rest` are the rows that fill no tile.
template <bool ACROSS>
static void multiply_group(i64 depth, const float* a, i64 a_stride, i64 count, const float* rest, const float* panels,
                           i64 panel_stride, i64 columns, float* c, i64 c_stride, bool add) {
  for (i64 x = 0; x < columns; x += NR, panels += panel_stride)
    for (i64 r = 0; r < count; r += MR) {
      const float* from = ACROSS ? a + r * depth : r + MR <= count ? a + r * a_stride : rest;
      const i64 stride = ACROSS ? MR : r + MR <= count ? a_stride : DEPTH;
      float* to = c + r * c_stride + x;
      if (r + MR > count || x + NR > columns)
        edge_tile<ACROSS>(depth, from, stride, panels, to, c_stride, smaller(MR, count - r), smaller(NR, columns - x),
                          add);
      else
        (add ? tile<ACROSS, true> : tile<ACROSS, false>)(depth, from, stride, panels, NR, to, c_stride, nullptr);
    }
}

static void add_to_rows(float* c, i64 stride, i64 rows, i64 columns, const float* bias) {
  for (i64 r = 0; r < rows; ++r)
    for_columns(columns, [&](i64 x, i64 n) {
      float* place = c + r * stride + x;
      store_at(place, load_at(place, n) + load_at(bias + x, n), n);
    });
}

void matmul(uintptr_t a, i64 a_stride, bool a_across, uintptr_t b, i64 b_stride, bool b_across, uintptr_t c,
            i64 c_stride, uintptr_t bias, uintptr_t workspace, i64 rows, i64 columns, i64 depth, bool add,
            int threads) {
  // S: the broadcast side (length x depth, or across); P: the packed one.
  const float *s = (const float*)(b_across ? b : a), *p = (const float*)(b_across ? a : b);
  const i64 s_stride = b_across ? b_stride : a_stride, p_stride = b_across ? a_stride : b_stride;
  const i64 length = b_across ? columns : rows, packed = b_across ? rows : columns;
  const Blocks blocks(a_across, b_across, depth);
  const i64 groups = (length + GROUP - 1) / GROUP, all = (packed + blocks.packed - 1) / blocks.packed;
  const i64 floats = MatmulSpace(nullptr, blocks, packed).floats;
  parallel_shares(all * groups, 1, threads, [&](int share, i64 begin, i64 end) {
    const MatmulSpace space((float*)workspace + share * floats, blocks, packed);
    for (i64 unit = begin; unit < end;) {
      const i64 block = unit / groups, last = smaller(end, (block + 1) * groups);
      const i64 p0 = block * blocks.packed, width = smaller(blocks.packed, packed - p0), wide = up(width, NR);
      for (i64 start = 0; start < depth; start += blocks.depth) {
        const i64 deep = smaller(blocks.depth, depth - start);
        if (b_across)
          pack_transposed(p + p0 * p_stride + start, p_stride, width, deep, space.panels);
        else
          pack_columns(p + start * p_stride + p0, p_stride, deep, width, space.panels);
        for (i64 g = unit - block * groups; g < last - block * groups; ++g) {
          const i64 r0 = g * GROUP, count = smaller(GROUP, length - r0), whole = count / MR * MR;
          const bool more = add || start > 0;
          float* place = (float*)c + (b_across ? p0 * c_stride + r0 : r0 * c_stride + p0);
          for (i64 k0 = 0; k0 < deep; k0 += DEPTH) {
            const i64 kept = smaller(DEPTH, deep - k0);
            const float* panels = space.panels + k0 * NR;
            if (a_across) {
              pack_across(s + (start + k0) * s_stride + r0, s_stride, kept, count, space.group);
              multiply_group<true>(kept, space.group, MR, count, nullptr, panels, deep * NR, width, place, c_stride,
                                   more || k0);
              continue;
            }
            const float* from = s + r0 * s_stride + start + k0;
            // A tile may not read past the last row.
            if (whole < count)
              pack_rows(from + whole * s_stride, s_stride, count - whole, kept, 1.0f, space.group, DEPTH, MR);
            if (b_across)
              multiply_group<false>(kept, from, s_stride, count, space.group, panels, deep * NR, wide, space.out, wide,
                                    k0 > 0);
            else
              multiply_group<false>(kept, from, s_stride, count, space.group, panels, deep * NR, width, place, c_stride,
                                    more || k0);
          }
          if (b_across)
            store_turned(space.out, wide, count, width, bias ? (const float*)bias + r0 : nullptr, more, place, c_stride);
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

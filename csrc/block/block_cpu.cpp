// A whole pre-norm transformer block in one call, forward and backward: fp32, causal.
//
//   forward   s1 = x + branch (or x);  a = M1 c_proj(attention(c_attn(ln_1(s1))))
//             s2 = s1 + a;  out = M2 c_proj(gelu(c_fc(ln_2(s2))))
//             M1, M2 and one of attention's probabilities: dropout's masks / (1 - dropout), or 1
//             gives s2 and out, not yet added: the next block's first norm adds them in its pass.
//   source    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
//   layout    x, branch, s2, out (B, T, C); weights (out, in); all contiguous. qkv is packed, q|k|v.
//   moves     what its kernels move. It computes nothing of its own: it is their order, at no cost between two
//             of them, where one op after the other costs some 0.1 ms of Python in the forward and as much in the
//             backward of a layer, which is all the time that a small model takes.
//   saves     s1, ln_1(s1), qkv, attention's output and lse, ln_2(s2), c_fc's output without its bias, and the norms'
//             statistics, in one piece of memory: 11 C + 4 + 2 H floats a token for a hidden layer of 4 C.
#include "common/tile.h"

#include "attention/attention_cpu.h"
#include "block/block_cpu.h"
#include "gelu/gelu_cpu.h"
#include "layer_norm/layer_norm_cpu.h"
#include "linear/linear_cpu.h"

namespace gpt2fast {
namespace GPT2FAST_ISA {

namespace {

struct Layer {
  float *weight, *bias;
};

// The addresses in `table`, in this order: weights, or in the backward those of their gradients, 0 where none is wanted.
struct Parameters {
  Layer ln_1, attn, proj, ln_2, fc, out;
};
struct ForwardTable {
  const i64* seeds;  // of attention's dropout, of M1 and of M2; 0 without dropout
  const float *x, *branch;
  Parameters weights;
  float *sum, *out, *saved, *workspace;  // s2 and out; without `saved` nothing is kept for a backward
};
struct BackwardTable {
  const i64* seeds;
  const float *x;  // s1 where there was no branch, or 0
  Parameters weights;
  const float *sum, *saved, *dsum, *dout;
  Parameters gradients;
  float *dx, *workspace;
};

struct Shape {
  i64 batch, length, heads, width, hidden;
  i64 rows() const { return batch * length; }
  i64 size() const { return width / heads; }
};

// What the backward needs, without gaps: every number is written. s1 is there where a branch came.
struct Saved {
  float *s1, *y1, *qkv, *attended, *y2, *h, *lse, *statistics_1, *statistics_2;
  i64 floats;
  Saved(float* base, const Shape& shape, bool branch) {
    const i64 rows = shape.rows(), C = shape.width;
    float* next = base;
    const auto take = [&](i64 count) {
      float* piece = next;
      next += count;
      return piece;
    };
    s1 = take(branch ? rows * C : 0);
    y1 = take(rows * C);
    qkv = take(rows * 3 * C);
    attended = take(rows * C);
    y2 = take(rows * C);
    h = take(rows * shape.hidden);
    lse = take(2 * rows * shape.heads);
    statistics_1 = take(2 * rows);
    statistics_2 = take(2 * rows);
    floats = next - base;
  }
};

// Rows whose activation exists at a time in the forward: a product runs at full rate on them.
constexpr i64 CHUNK = 1024;

// Memory of a call: `kernel` is what its kernels ask for, one at a time.
struct Space {
  float *kernel, *branch, *wide, *activation, *narrow, *saved;
  i64 floats;
  Space(float* base, const Shape& shape, bool backward, bool keeps, int threads) {
    const i64 rows = shape.rows(), C = shape.width, F = shape.hidden, heads = shape.batch * shape.heads;
    const i64 layers[][2] = {{C, 3 * C}, {C, C}, {C, F}, {F, C}};  // in, out
    i64 most = backward ? attention_backward_workspace(heads, shape.length, shape.length, shape.size(), threads)
                        : attention_forward_workspace(shape.length, shape.size(), threads);
    const i64 counts[] = {rows, smaller(rows, CHUNK), rows % CHUNK};  // fewer rows may ask for more
    for (const auto& [in, out] : layers) {
      if (!backward) {
        for (const i64 count : counts) most = larger(most, matmul_workspace(count, out, in, false, true, threads));
        continue;
      }
      most = larger(most, matmul_workspace(rows, in, out, false, false, threads));
      most = larger(most, matmul_workspace(out, in, rows, true, false, threads));
      most = larger(most, threads * 4 * larger(in, out));  // of the sums over rows
    }
    Arena arena{base};
    kernel = arena.take(most);
    branch = arena.take(rows * C);
    activation = arena.take((backward ? rows : smaller(rows, CHUNK)) * larger(F, C));
    wide = arena.take(backward ? rows * larger(F, 3 * C) : 0);
    narrow = arena.take(backward ? rows * C : 0);
    saved = arena.take(backward || keeps ? 0 : Saved(nullptr, shape, true).floats);
    floats = arena.next - base;
  }
};

// The products of one layer (out x in) on so many rows.
struct Products {
  i64 rows;
  float* workspace;
  int threads;
  // y = x W^T + bias
  void forward(const float* x, i64 in, const float* weight, const float* bias, float* y, i64 out) const {
    matmul(uintptr_t(x), in, false, uintptr_t(weight), in, true, uintptr_t(y), out, uintptr_t(bias),
           uintptr_t(workspace), rows, out, in, false, threads);
  }
  // dx = dy W
  void input(const float* dy, i64 out, const float* weight, float* dx, i64 in) const {
    matmul(uintptr_t(dy), out, false, uintptr_t(weight), in, false, uintptr_t(dx), in, 0, uintptr_t(workspace), rows,
           in, out, false, threads);
  }
  // dW = dy^T x and db = sum of dy over rows, where wanted
  void parameters(const float* dy, i64 out, const float* x, i64 in, const Layer& gradient) const {
    if (gradient.weight)
      matmul(uintptr_t(dy), out, true, uintptr_t(x), in, false, uintptr_t(gradient.weight), in, 0,
             uintptr_t(workspace), out, in, rows, false, threads);
    if (gradient.bias)
      column_sum(uintptr_t(dy), out, uintptr_t(gradient.bias), uintptr_t(workspace), rows, out, 0, threads);
  }
};

struct Mask {
  double dropout;
  i64 seed;
  // `from` with the mask, at `to`; where nothing is dropped it is `from` itself.
  const float* apply(const float* from, float* to, const Products& products, i64 columns) const {
    if (dropout == 0.0) return from;
    dropout_rows(uintptr_t(from), uintptr_t(to), products.rows, columns, dropout, seed, 0, products.threads);
    return to;
  }
};
struct Masks {
  Mask attention, branch, mlp;
  Masks(const i64* seeds, double attention_dropout, double branch_dropout, double mlp_dropout)
      : attention{attention_dropout, seeds ? seeds[0] : 0},
        branch{branch_dropout, seeds ? seeds[1] : 0},
        mlp{mlp_dropout, seeds ? seeds[2] : 0} {}
};

void norm_backward(const float* dy, const float* dsum, const float* x, const Layer& weights, const float* statistics,
                   float* dx, const Layer& gradient, const Products& products, i64 columns) {
  const i64 rows = products.rows;
  const bool wanted = gradient.weight || gradient.bias;
  layer_norm_backward(uintptr_t(dy), columns, uintptr_t(dsum), columns, uintptr_t(x), columns,
                      uintptr_t(weights.weight), uintptr_t(statistics), uintptr_t(statistics + rows), uintptr_t(dx),
                      uintptr_t(gradient.weight), uintptr_t(gradient.bias),
                      wanted ? uintptr_t(products.workspace) : 0, rows, columns, 0, products.threads);
}
}  // namespace

i64 block_saved(i64 batch, i64 length, i64 n_head, i64 n_embd, i64 hidden, bool branch) {
  return Saved(nullptr, {batch, length, n_head, n_embd, hidden}, branch).floats;
}

i64 block_workspace(i64 batch, i64 length, i64 n_head, i64 n_embd, i64 hidden, bool backward, bool keeps, int threads) {
  return Space(nullptr, {batch, length, n_head, n_embd, hidden}, backward, keeps, threads).floats;
}

void block_forward(uintptr_t table, i64 batch, i64 length, i64 n_head, i64 n_embd, i64 hidden, float eps_1,
                   float eps_2, double attention_dropout, double branch_dropout, double mlp_dropout, int threads) {
  const ForwardTable& io = *(const ForwardTable*)table;
  const Parameters& w = io.weights;
  const Shape shape{batch, length, n_head, n_embd, hidden};
  const i64 rows = shape.rows(), C = n_embd;
  const Space space(io.workspace, shape, false, io.saved, threads);
  const Saved kept(io.saved ? io.saved : space.saved, shape, io.branch);
  const Products products{rows, space.kernel, threads};
  const Masks masks(io.seeds, attention_dropout, branch_dropout, mlp_dropout);
  // The norm of M first + second, or of first.
  const auto norm = [&](const float* first, const float* second, const Mask& mask, const Layer& layer, float* sum,
                        float* y, float* statistics, float eps) {
    layer_norm_forward(uintptr_t(first), C, uintptr_t(second), C, uintptr_t(layer.weight), uintptr_t(layer.bias),
                       uintptr_t(sum), uintptr_t(y), uintptr_t(statistics), uintptr_t(statistics + rows), rows, C, eps,
                       mask.dropout, mask.seed, 0, threads);
  };
  if (io.branch)
    norm(io.branch, io.x, {0.0, 0}, w.ln_1, kept.s1, kept.y1, kept.statistics_1, eps_1);
  else
    norm(io.x, nullptr, {0.0, 0}, w.ln_1, nullptr, kept.y1, kept.statistics_1, eps_1);
  products.forward(kept.y1, C, w.attn.weight, w.attn.bias, kept.qkv, 3 * C);
  const i64 size = shape.size();
  const uintptr_t q = uintptr_t(kept.qkv), k = uintptr_t(kept.qkv + C), v = uintptr_t(kept.qkv + 2 * C);
  attention_forward(q, length * 3 * C, 3 * C, size, k, length * 3 * C, 3 * C, size, v, length * 3 * C, 3 * C, size,
                    uintptr_t(kept.attended), length * C, C, size, uintptr_t(kept.lse), uintptr_t(space.kernel), batch,
                    n_head, length, length, size, 0, float(1.0 / __builtin_sqrt(double(size))), masks.attention.dropout,
                    masks.attention.seed, 0, 0, threads);
  products.forward(kept.attended, C, w.proj.weight, w.proj.bias, space.branch, C);
  norm(space.branch, io.branch ? kept.s1 : io.x, masks.branch, w.ln_2, io.sum, kept.y2, kept.statistics_2, eps_2);
  for (i64 r = 0; r < rows; r += CHUNK) {
    const i64 count = smaller(CHUNK, rows - r);
    const Products some{count, space.kernel, threads};
    float* h = kept.h + r * hidden;
    some.forward(kept.y2 + r * C, C, w.fc.weight, nullptr, h, hidden);
    gelu_forward(uintptr_t(h), hidden, uintptr_t(w.fc.bias), uintptr_t(space.activation), count, hidden, 0, threads);
    some.forward(space.activation, hidden, w.out.weight, w.out.bias, io.out + r * C, C);
  }
  masks.mlp.apply(io.out, io.out, products, C);
}

void block_backward(uintptr_t table, i64 batch, i64 length, i64 n_head, i64 n_embd, i64 hidden,
                    double attention_dropout, double branch_dropout, double mlp_dropout, int threads) {
  const BackwardTable& io = *(const BackwardTable*)table;
  const Parameters &w = io.weights, &g = io.gradients;
  const Shape shape{batch, length, n_head, n_embd, hidden};
  const i64 rows = shape.rows(), C = n_embd;
  const Space space(io.workspace, shape, true, true, threads);
  const Saved kept((float*)io.saved, shape, !io.x);
  const Products products{rows, space.kernel, threads};

  const Masks masks(io.seeds, attention_dropout, branch_dropout, mlp_dropout);

  const float* dout = masks.mlp.apply(io.dout, space.narrow, products, C);
  products.input(dout, C, w.out.weight, space.wide, hidden);
  gelu_backward(uintptr_t(space.wide), hidden, uintptr_t(kept.h), hidden, uintptr_t(w.fc.bias), uintptr_t(space.wide),
                uintptr_t(g.out.weight ? space.activation : nullptr), uintptr_t(g.fc.bias), uintptr_t(space.kernel),
                rows, hidden, 0, threads);
  products.parameters(dout, C, space.activation, hidden, g.out);
  products.parameters(space.wide, hidden, kept.y2, C, {g.fc.weight, nullptr});
  products.input(space.wide, hidden, w.fc.weight, space.narrow, C);
  norm_backward(space.narrow, io.dsum, io.sum, w.ln_2, kept.statistics_2, space.branch, g.ln_2, products, C);

  const float* dbranch = masks.branch.apply(space.branch, space.narrow, products, C);
  float* dattended = space.activation;
  products.input(dbranch, C, w.proj.weight, dattended, C);
  products.parameters(dbranch, C, kept.attended, C, g.proj);
  const i64 size = shape.size(), b = length * 3 * C, t = 3 * C;
  const auto part = [&](float* packed, i64 which) { return uintptr_t(packed + which * C); };
  attention_backward(uintptr_t(dattended), length * C, C, size, part(kept.qkv, 0), b, t, size, part(kept.qkv, 1), b, t,
                     size, part(kept.qkv, 2), b, t, size, uintptr_t(kept.attended), length * C, C, size,
                     uintptr_t(kept.lse), part(space.wide, 0), b, t, size, part(space.wide, 1), b, t, size,
                     part(space.wide, 2), b, t, size, uintptr_t(space.kernel), batch, n_head, length, length, size, 0,
                     float(1.0 / __builtin_sqrt(double(size))), masks.attention.dropout, masks.attention.seed, 0, 0,
                     threads);
  products.parameters(space.wide, 3 * C, kept.y1, C, g.attn);
  if (!io.dx && !g.ln_1.weight && !g.ln_1.bias) return;
  products.input(space.wide, 3 * C, w.attn.weight, space.narrow, C);
  norm_backward(space.narrow, space.branch, io.x ? io.x : kept.s1, w.ln_1, kept.statistics_1, io.dx, g.ln_1, products,
                C);
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

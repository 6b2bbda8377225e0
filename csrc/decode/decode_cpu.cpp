// A whole GPT-2 for a few new tokens that continue a key/value cache, in one call.
//
//   computes  logits of idx (batch, length), at positions from `position` on; their keys and values are appended.
//   source    Radford et al. 2019 (GPT-2); the same model as gpt2fast.model.GPT.
//   layout    activations fp32; weights fp32, bf16 or int8 (csrc/decode/product.h); the cache is contiguous
//             (n_layer, batch, n_head, capacity, head size) fp32: what a head reads lies in one piece.
//   moves     every weight once, and the cache once: the rest stays in the caches.
//   work      one parallel region for all layers. Threads take outputs of a product until none is left, and add
//             the bias, GELU or the residual to their own; (row, head) pairs in attention; rows in the norms. Only
//             who computes an output depends on that, not its bits.
#include "common/simd.h"

#include "attention/attention_cpu.h"
#include "decode/attend.h"
#include "decode/decode_cpu.h"
#include "decode/product.h"
#include "gelu/gelu_cpu.h"
#include "layer_norm/layer_norm_cpu.h"

extern "C" float sqrtf(float);

namespace gpt2fast {
namespace GPT2FAST_ISA {

// One of the threads of a parallel region.
struct Team {
  int me, size;
  i64* taken;  // of this phase's units and of the next one's
  int phase;

  // body(begin, end) on parts of `count` items until they are all taken; goes on when all threads are done. Parts are
  // multiples of `grain` items and shrink towards `least`: few streams, and threads of unequal speed end together.
  template <class Body>
  void split(i64 count, i64 grain, i64 least, const Body& body) {
    const i64 units = (count + grain - 1) / grain;
    const auto run = [&](i64 from, i64 to) { body(from * grain, to * grain < count ? to * grain : count); };
    if (size == 1) {
      if (units) run(0, units);
      return;
    }
    i64 &now = taken[phase * 8], &next = taken[(phase ^ 1) * 8];  // on cache lines of their own
    phase ^= 1;
    if (me == 0) __atomic_store_n(&next, 0, __ATOMIC_RELAXED);
    i64 from = __atomic_load_n(&now, __ATOMIC_RELAXED);
    while (from < units) {
      const i64 part = larger((units - from) / (2 * size), (least + grain - 1) / grain);
      const i64 to = smaller(from + part, units);
      if (!__atomic_compare_exchange_n(&now, &from, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      run(from, to);
      from = __atomic_load_n(&now, __ATOMIC_RELAXED);
    }
#if defined(_OPENMP)
#pragma omp barrier
#endif
  }
};

template <class Body>
static void parallel_team(int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1) {
    alignas(64) i64 taken[16] = {};
#pragma omp parallel num_threads(threads)
    {
      Team team{omp_get_thread_num(), omp_get_num_threads(), taken, 0};
      body(team);
    }
    return;
  }
#endif
  (void)threads;
  Team team{0, 1, nullptr, 0};
  body(team);
}

// Outputs of a product that are worth a part of their own.
constexpr i64 PART_BYTES = 1 << 15;
template <class W>
static i64 least_outputs(i64 columns) {
  return PART_BYTES / (columns * i64(sizeof(W)));
}

// body(W()) with the type of weights that a number names: fp32, bf16, int8; 3 is int8 by VNNI whether it is there or
// not, for tests.
template <class Body>
static void with_weights(int weights, const Body& body) {
  if (weights == 0)
    body(float());
  else if (weights == 1)
    body(bf16());
#if defined(GPT2FAST_DECODE_VNNI)
  else if (weights == 3 || has_vnni())
    body(int8_vnni());
#endif
  else
    body(int8_t());
}

// Weights below which a second thread costs more than it brings.
constexpr i64 TEAM_GRAIN = 1 << 15;
static int team_size(i64 weights, i64 rows, int threads) {
  const i64 useful = 1 + weights * rows / TEAM_GRAIN;
  return useful < threads ? int(useful) : threads;
}

static void add_rows(float* x, i64 x_stride, const float* y, i64 y_stride, const float* bias, i64 rows, i64 columns) {
  for (i64 r = 0; r < rows; ++r)
    for_columns(columns, [&](i64 c, i64 n) {
      vf sum = load_at(y + r * y_stride + c, n);
      if (bias) sum += load_at(bias + c, n);
      store_at(x + r * x_stride + c, load_at(x + r * x_stride + c, n) + sum, n);
    });
}

// ---- one product, for tests and for callers with a matrix of their own -------------------------------------

i64 few_rows_workspace(i64 rows, i64 columns) { return rows * (padded(columns) + 1); }

void few_rows_linear(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t bias, uintptr_t y, uintptr_t workspace,
                     i64 rows, i64 columns, i64 outputs, int weights, int threads) {
  with_weights(weights, [&](auto type) {
    using W = decltype(type);
    const Matrix<W> matrix{(const W*)weight, (const float*)scale, (const float*)bias, outputs, columns};
    float* space = (float*)workspace;
    const Inputs<W> in{(typename Dot<W>::Input*)space, space + rows * padded(columns), padded(columns)};
    parallel_team(team_size(outputs * columns, rows, threads), [&](Team& team) {
      team.split(rows, 1, 1, [&](i64 begin, i64 end) {
        for (i64 r = begin; r < end; ++r) prepare((const float*)x + r * columns, columns, in, r);
      });
      team.split(outputs, TILE_N, least_outputs<W>(columns), [&](i64 begin, i64 end) {
        product(matrix, in, rows, (float*)y, outputs, begin, end);
        for (i64 r = 0; bias && r < rows; ++r)
          for_columns(end - begin, [&](i64 c, i64 n) {
            float* at = (float*)y + r * outputs + begin + c;
            store_at(at, load_at(at, n) + load_at(matrix.bias + begin + c, n), n);
          });
      });
    });
  });
}

// ---- the model -----------------------------------------------------------------------------------------------

// Addresses in `table`: of each layer 2 norms (weight, bias) and 4 matrices (weight, scale, bias), in the model's
// order; then of the final norm, the token embedding (weight, scale) and the positions.
constexpr i64 LAYER_ENTRIES = 16;

struct Norm {
  uintptr_t weight, bias;
};

struct Space {
  float *x, *wide, *y, *attended, *lse, *attention;
  float *normal, *prepared, *scale, *statistics;  // inputs of the next product
  i64 attention_floats, inputs_floats, floats;
  Space(float* base, i64 rows, i64 capacity, i64 n_head, i64 n_embd, int threads) {
    attention_floats = larger(attention_forward_workspace(capacity, n_embd / n_head, 1), up(capacity, VL));
    float* next = base;
    const auto take = [&](i64 count) {
      float* piece = next;
      next += (count + 15) / 16 * 16;
      return piece;
    };
    x = take(rows * n_embd);
    wide = take(rows * 4 * n_embd);  // q, k, v, or the MLP's hidden layer
    y = take(rows * n_embd);
    attended = take(rows * n_embd);
    lse = take(rows * 2 * n_head);  // what attention saves for a backward
    attention = take(threads * attention_floats);
    float* inputs = next;
    normal = take(rows * n_embd);
    prepared = take(rows * padded(4 * n_embd));
    scale = take(rows);
    statistics = take(rows * 2);  // what norms save for a backward
    inputs_floats = next - inputs;
    floats = next - base + (rows == 1 ? threads - 1 : 0) * inputs_floats;
  }
  // The same with inputs of products that are a thread's own.
  Space with_inputs_of(int thread) const {
    Space own = *this;
    float** const pieces[] = {&own.normal, &own.prepared, &own.scale, &own.statistics};
    for (float** piece : pieces) *piece += thread * inputs_floats;
    return own;
  }
};

i64 decode_workspace(i64 rows, i64 capacity, i64 n_head, i64 n_embd, int threads) {
  return Space(nullptr, rows, capacity, n_head, n_embd, threads).floats;
}

template <class W>
struct Model {
  const i64 *table, *idx;
  float *keys, *values, *logits;
  Space space;
  i64 batch, length, position, capacity, n_layer, n_head, n_embd, vocab_size;
  float eps;
  bool every;

  i64 rows() const { return batch * length; }
  const i64* last() const { return table + n_layer * LAYER_ENTRIES; }
  Norm norm(const i64* at) const { return {uintptr_t(at[0]), uintptr_t(at[1])}; }
  Matrix<W> matrix(const i64* at, i64 outputs, i64 columns) const {
    return {(const W*)at[0], (const float*)at[1], (const float*)at[2], outputs, columns};
  }
  Inputs<W> inputs(i64 columns) const {
    return {(typename Dot<W>::Input*)space.prepared, space.scale, padded(columns)};
  }

  void embed(i64 row) const {
    const W* token = (const W*)last()[2] + idx[row] * n_embd;
    const float factor = last()[3] ? ((const float*)last()[3])[idx[row]] : 1.0f;
    const float* place = (const float*)last()[4] + (position + row % length) * n_embd;
    for (i64 c = 0; c < n_embd; ++c) space.x[row * n_embd + c] = value(token + c) * factor + place[c];
  }
  static float value(const int8_t* w) { return float(*w); }
#if defined(GPT2FAST_DECODE_VNNI)
  static float value(const int8_vnni* w) { return float(w->q); }
#endif
  template <class T>
  static float value(const T* w) {
    return get(w);
  }

  // The norm of row `from` of x, as input number `to` of the next products.
  void normalise(const Norm& weights, i64 from, i64 to) const {
    float* y = space.normal + to * n_embd;
    layer_norm_forward(uintptr_t(space.x + from * n_embd), n_embd, 0, 0, weights.weight, weights.bias, 0,
                       uintptr_t(y), uintptr_t(space.statistics + 2 * to), uintptr_t(space.statistics + 2 * to + 1), 1,
                       n_embd, eps, 0.0, 0, 0, 1);
    prepare(y, n_embd, inputs(n_embd), to);
  }

  // Appends the keys and values of one head of one batch entry, and attends.
  void attend(i64 layer, i64 pair, int me) const {
    const i64 b = pair / n_head, h = pair % n_head, size = n_embd / n_head, packed = 3 * n_embd;
    const i64 place = ((layer * batch + b) * n_head + h) * capacity * size;
    const float* query = space.wide + b * length * packed + h * size;
    float *key = keys + place, *value = values + place, *own = space.attention + me * space.attention_floats;
    float* out = space.attended + b * length * n_embd + h * size;
    for (i64 t = 0; t < length; ++t)
      for (i64 d = 0; d < size; ++d) {
        key[(position + t) * size + d] = query[t * packed + n_embd + d];
        value[(position + t) * size + d] = query[t * packed + 2 * n_embd + d];
      }
    if (length == 1) return attend_one(query, key, value, position + 1, size, own, out);
    attention_forward(uintptr_t(query), 0, packed, 0, uintptr_t(key), 0, size, 0, uintptr_t(value), 0, size, 0,
                      uintptr_t(out), 0, n_embd, 0, uintptr_t(space.lse + 2 * pair * length), uintptr_t(own), 1, 1,
                      length, position + length, size, position, 1.0f / sqrtf(float(size)), 0.0, 0, 0, 0, 1);
  }

  // body(row) for the inputs of a product. One row is every thread's own work: that costs less than a barrier.
  template <class Body>
  void each_input(Team& team, i64 count, const Body& body) const {
    if (rows() == 1) return body(0);
    team.split(count, 1, 1, [&](i64 begin, i64 end) {
      for (i64 r = begin; r < end; ++r) body(r);
    });
  }

  // body(begin, end) on parts of a product's outputs.
  template <class Body>
  void each_output(Team& team, i64 outputs, i64 columns, const Body& body) const {
    team.split(outputs, TILE_N, least_outputs<W>(columns), body);
  }

  void run(Team& team) const {
    const i64 C = n_embd, M = rows();
    team.split(M, 1, 1, [&](i64 begin, i64 end) {
      for (i64 r = begin; r < end; ++r) embed(r);
    });
    // x += in W^T + bias
    const auto add_product = [&](const Matrix<W>& m, const float* in) {
      each_input(team, M, [&](i64 r) { prepare(in + r * m.columns, m.columns, inputs(m.columns), r); });
      each_output(team, C, m.columns, [&](i64 begin, i64 end) {
        product(m, inputs(m.columns), M, space.y, C, begin, end);
        add_rows(space.x + begin, C, space.y + begin, C, m.bias ? m.bias + begin : nullptr, M, end - begin);
      });
    };
    for (i64 layer = 0; layer < n_layer; ++layer) {
      const i64* at = table + layer * LAYER_ENTRIES;
      const Matrix<W> qkv = matrix(at + 2, 3 * C, C), fc = matrix(at + 10, 4 * C, C);
      each_input(team, M, [&](i64 r) { normalise(norm(at), r, r); });
      each_output(team, qkv.rows, C, [&](i64 begin, i64 end) {
        product(qkv, inputs(C), M, space.wide, qkv.rows, begin, end);
        for (i64 r = 0; qkv.bias && r < M; ++r) {
          float* row = space.wide + r * qkv.rows;
          for (i64 c = begin; c < end; ++c) row[c] += qkv.bias[c];
        }
      });
      team.split(batch * n_head, 1, 1, [&](i64 begin, i64 end) {
        for (i64 pair = begin; pair < end; ++pair) attend(layer, pair, team.me);
      });
      add_product(matrix(at + 5, C, C), space.attended);
      each_input(team, M, [&](i64 r) { normalise(norm(at + 8), r, r); });
      each_output(team, fc.rows, C, [&](i64 begin, i64 end) {
        product(fc, inputs(C), M, space.wide, fc.rows, begin, end);
        for (i64 r = 0; r < M; ++r) {
          const uintptr_t hidden = uintptr_t(space.wide + r * fc.rows + begin);
          gelu_forward(hidden, 0, uintptr_t(fc.bias ? fc.bias + begin : nullptr), hidden, 1, end - begin, 0, 1);
        }
      });
      add_product(matrix(at + 13, C, 4 * C), space.wide);
    }
    if (!logits) return;
    const i64 wanted = every ? M : batch;
    each_input(team, wanted, [&](i64 r) { normalise(norm(last()), every ? r : (r + 1) * length - 1, r); });
    const Matrix<W> head{(const W*)last()[2], (const float*)last()[3], nullptr, vocab_size, C};
    each_output(team, vocab_size, C, [&](i64 begin, i64 end) {
      product(head, inputs(C), wanted, logits, vocab_size, begin, end);
    });
  }
};

// logits (batch, vocab_size) of the last positions, or (batch * length, vocab_size) of `every` one, or none (0).
// Returns the first place in idx that names no token, and then does nothing; else -1.
i64 decode_step(uintptr_t table, uintptr_t idx, uintptr_t keys, uintptr_t values, uintptr_t logits,
                uintptr_t workspace, i64 batch, i64 length, i64 position, i64 capacity, i64 n_layer, i64 n_head,
                i64 n_embd, i64 vocab_size, float eps, bool every, int weights, int threads) {
  const i64 rows = batch * length;
  for (i64 i = 0; i < rows; ++i)
    if (((const i64*)idx)[i] < 0 || ((const i64*)idx)[i] >= vocab_size) return i;
  threads = team_size(vocab_size * n_embd, rows, threads);
  with_weights(weights, [&](auto type) {
    using W = decltype(type);
    const Model<W> model{(const i64*)table, (const i64*)idx, (float*)keys, (float*)values, (float*)logits,
                         Space((float*)workspace, rows, capacity, n_head, n_embd, threads), batch, length, position,
                         capacity, n_layer, n_head, n_embd, vocab_size, eps, every};
    parallel_team(threads, [&](Team& team) {
      Model<W> own = model;
      if (rows == 1) own.space = model.space.with_inputs_of(team.me);
      own.run(team);
    });
  });
  return -1;
}

}  // namespace GPT2FAST_ISA
}  // namespace gpt2fast

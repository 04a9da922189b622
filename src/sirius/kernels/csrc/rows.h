// What every instruction set's build of rows.cpp offers. Weights are neuron-major: row j of w belongs to neuron j, and
// begins `stride` elements after the last one.
//
// A product runs in one of several ways, which give the same bits. "Dots" is bfloat16 where an instruction multiplies
// it as it is (kDots: avx512bf16, emulated); "widened" is everything else, but for "tiles": bfloat16 in the instruction
// set amx (kTiles). "Packed" rows have no index and no gaps between them (stride = width).
//
//   operation  numbers  rows             tokens   way     function         what it does
//   linear     dots     packed           1 - (1)  stream  linear_stream    a thread reads its rows as one run
//              dots     packed           more     tiles   linear_tiles     6 rows x 4 tokens at a time in registers
//              dots     index or gaps    1 - 2    few     linear_few       a thread reads 4 runs of rows side by side
//              dots     index or gaps    3 -      tiles   linear_tiles
//              widened  any              1 - 2    few     linear_few
//              widened  any              3 -      panels  linear_panels    rows are widened once for 16 tokens
//              tiles    no index (2)     any      amx     InPlace          tiles are loaded from where rows lie
//              tiles    others           any      amx     Copied           tiles are copied from 16 runs side by side
//   project    any      any              1        few     project_one      rows are added up where they lie
//              dots     any              2 -      strips  Strips           64 rows x 32 columns are paired once for 16 tokens
//              widened  any              2 -      panels  project_columns  rows are widened once for 16 tokens
//              tiles    any              1        few     OneToken         the sums of tiles by other instructions
//              tiles    any              2 -      amx     Prepared         128 rows at a time, by tiles
//   finish     dots     no index         any      many    finish_many      linear, then project
//              dots     index            1 - 4    few     finish_few       up and down of a neuron in one run
//              widened  any              1 - 4    few     finish_few
//              any      any              5 -      many    finish_many
//              tiles    any              any      many    finish_many
//   each       any      index            any      few     each_of          4 tokens of a row at a time
//              tiles    index            any      amx     TileSets         linear and project of all rows side by side
//
// (1) 4, or 12 if they fit into the first-level cache beside the stream.
// (2) and the width a multiple of 32, the number of rows one of 16.
//
// finish also takes finish_many where there are fewer chunks (Chunks in project.h) than threads.

#pragma once

#include <cstdint>

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// y[m][i] = dot(x[m], w[index[i]]) + bias[i]     x [rows, width], w [*, width], bias [count] or null, y [rows, count]
// index [count], or null for 0 .. count - 1
struct Linear {
  Dtype dtype;
  const void* x;
  int64_t rows, width;
  const void* w;
  int64_t stride, count;
  const int64_t* index;
  const void* bias;
  void* y;
  int threads;
};

// y[m] = sum over i of z[m][i] * w[index[i]], + bias     z [rows, count], w [*, width], bias [width] or null,
// y [rows, width]
struct Project {
  Dtype dtype;
  const void* z;
  int64_t rows, count;
  const int64_t* index;
  const void* w;
  int64_t stride, width;
  const void* bias;
  void* y;
  int threads;
};

// What gated neurons come to: y[m] = sum over i of z[m][i] * down[index[i]], + bias, where z[m][i] is the gate times
// dot(x[m], up[index[i]]) + up_bias[index[i]], and the gate is gated[m][i] if `by_place`, else gated[m][index[i]].
// x [rows, width], gated [rows, size], up, down [*, width], y [rows, width]
struct Finish {
  Dtype dtype;
  const void* x;
  int64_t rows, width;
  const void* gated;
  int64_t size;
  bool by_place;
  const void* up;
  int64_t up_stride;
  const void* down;
  int64_t down_stride, count;
  const int64_t* index;
  const void *up_bias, *bias;
  void* y;
  int threads;
};

enum ActivationKind : int { kSilu = 0, kGeluTanh = 1, kRelu = 2 };

// A gated MLP of rows that each have neurons of their own, those of row b the counts[b] at its part of `index`:
// y[b][t] = sum over them of act(gate(x[b][t])) * up(x[b][t]) times the neuron's row of down, + bias
// x, y [rows, tokens, width], gate, up, down [height, width], index [sum of counts], counts [rows]
struct Each {
  Dtype dtype;
  ActivationKind kind;
  const void* x;
  int64_t rows, tokens, width;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  const void* down;
  int64_t down_stride, height;
  const int64_t *index, *counts;
  const void *gate_bias, *up_bias, *bias;
  void* y;
  int threads;
};

// y = act(gate) * up, of `count` elements; act(gate) where up is null. y may be gate or up.
struct Activate {
  Dtype dtype;
  ActivationKind kind;
  const void *gate, *up;
  int64_t count;
  void* y;
  int threads;
};

// y[m][i] *= gated[m][index[i]], or gated[m][i] without an index     y [rows, count], gated [rows, size]
struct Weigh {
  Dtype dtype;
  const void* gated;
  int64_t rows, size, count;
  const int64_t* index;
  void* y;
  int threads;
};

// y[m] = x[m] / sqrt(mean of x[m]^2 + eps) * (weight + offset)     x, y [rows, width], weight [width]
// early: the quotient is rounded before the product
struct Norm {
  Dtype dtype;
  const void* x;
  int64_t rows, width;
  const void* weight;
  float eps, offset;
  bool early;
  void* y;
  int threads;
};

// y[b][h][t] = x[b][h][t] * cos[b][h][t] + turned * sin[b][h][t], numbers of `size` each, where `turned` is the second
// half of x, negated, and then the first. In 16 bits both products are rounded before the sum, as if kept in between.
struct Rotate {
  Dtype dtype;
  const void *x, *cos, *sin;
  const int64_t *x_at, *cos_at, *sin_at, *y_at;  // strides of a row, a head, a token; the last dimension lies together
  int64_t rows, heads, tokens, size;
  void* y;
  int threads;
};

// y = a + b, of `count` elements
struct Add {
  Dtype dtype;
  const void *a, *b;
  int64_t count;
  void* y;
  int threads;
};

// y[b][t][h] = what token t of row b sees of the slots, in head h     y [rows, tokens, heads, size]
// A row's first held[b] slots are seen by all of its tokens; of the `after` slots behind those, in all no more than
// `slots`, token t sees slot held[b] + i where seen[b][t][i]. A strides' last dimension, of `size`, lies together.
struct Attend {
  Dtype dtype;
  const void *query, *keys, *values;
  const int64_t *query_at, *keys_at, *values_at;  // strides of a row, a head, a token; of a row, a slot, a head
  const int64_t* held;
  const uint8_t* seen;
  int64_t rows, tokens, heads, kv_heads, slots, after, size;
  float scale, softcap;  // scores become softcap * tanh(score / softcap) where it is above 0
  void* y;
  int threads;
};

// A weight of 4 or 8 bits, its rows one after the other; quantized.py describes the format. base: the bits of floats if
// there are 8. bias null, or [height]
struct QuantizedWeight {
  const uint8_t *codes, *scales;
  const int32_t* base;
  int64_t height;
  const void* bias;
};

// The codes, scales and base of w [rows, width]
struct Quantize {
  Dtype dtype;
  const void* w;
  int64_t rows, width, stride;
  int bits;
  uint8_t *codes, *scales;
  int32_t* base;
  int threads;
};

// y[m][i] = dot(x[m], weight[index[i]]) + bias[i], of x rounded to 8 bits; act(that) * (the same of up) where there is
// one. x [rows, width], y [rows, count], index [count], or null for 0 .. count - 1
struct QuantizedProduct {
  Dtype dtype;
  ActivationKind kind;
  const void* x;
  int64_t rows, width;
  int bits;
  QuantizedWeight weight, up;  // up: codes null where there is none
  int64_t count;
  const int64_t* index;
  void* y;
  int threads;
};

// The places of the `count` largest values of each row, of equal ones the first     values [rows, width],
// out [rows, count]
struct Highest {
  Dtype dtype;
  const void* values;
  int64_t rows, width, count;
  int64_t* out;
  int threads;
};

// The operations above: the name of each and its struct. rows.cpp has `name_of<T>(const Struct&)` for each of them.
#define SIRIUS_OPERATIONS(X)     \
  X(linear, Linear)              \
  X(project, Project)            \
  X(finish, Finish)              \
  X(each, Each)                  \
  X(activate, Activate)          \
  X(norm, Norm)                  \
  X(rotate, Rotate)              \
  X(add, Add)                    \
  X(attend, Attend)              \
  X(quantize, Quantize)          \
  X(quantized, QuantizedProduct) \
  X(highest, Highest)

// Every sum runs in one order, whatever the number of rows or the place of a row among them: a token's result is the
// same bit for bit in a draft step, in a batch and in a check.
#define SIRIUS_POINTER(name, Struct) void (*name)(const Struct&);
struct Kernels {
  const char* name;
  SIRIUS_OPERATIONS(SIRIUS_POINTER)
};
#undef SIRIUS_POINTER

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;  // where the compiler knows it (SIRIUS_AMX)
extern const Kernels kernels_emulated;  // its bfloat16 dot products by AVX2

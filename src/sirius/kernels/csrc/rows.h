// What every instruction set's build of rows.cpp offers. Weights are neuron-major: row j of w belongs to neuron j.

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
  int64_t count;
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
  int64_t width;
  const void* bias;
  void* y;
  int threads;
};

// Every sum runs in one order, whatever the number of rows or the place of a row among them: a token's result is the
// same bit for bit in a draft step, in a batch and in a check.
struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*project)(const Project&);
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_emulated;  // its bfloat16 dot products by AVX2

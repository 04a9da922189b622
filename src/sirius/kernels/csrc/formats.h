// The number formats, vectors of SIRIUS_WIDTH floats that they widen to, and what is multiplied.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int kVector = SIRIUS_WIDTH;
constexpr int kLine = 64;  // bytes of a cache line
using Floats = float __attribute__((vector_size(kVector * 4)));
using Words = uint32_t __attribute__((vector_size(kVector * 4)));
using Halves = uint16_t __attribute__((vector_size(kVector * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

float widen(float x) { return x; }

float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

float widen(Float16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, bits;
  float wide;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {
    wide = float(rest) * 0x1p-24f;
    memcpy(&bits, &wide, 4);
  }
  bits |= sign;
  memcpy(&wide, &bits, 4);
  return wide;
}

void narrow(float x, float* to) { *to = x; }

void narrow(float x, BFloat16* to) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void narrow(float x, Float16* to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    to->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds past the largest
    to->bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // below the least normal one; this sum rounds by itself
    float small;
    memcpy(&small, &bits, 4);
    small += 0.5f;
    memcpy(&bits, &small, 4);
    to->bits = sign | uint16_t(bits - 0x3f000000);
  } else {
    to->bits = sign | uint16_t((bits + 0xc8000fff + (bits >> 13 & 1)) >> 13);
  }
}

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const BFloat16* p) {
  Halves half;
  memcpy(&half, p, sizeof half);
  Words wide = __builtin_convertvector(half, Words) << 16;
  Floats v;
  memcpy(&v, &wide, sizeof v);
  return v;
}

inline Floats load(const Float16* p) {
#if defined(__AVX512F__) && SIRIUS_WIDTH == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && SIRIUS_WIDTH == 8
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Floats v;
  for (int i = 0; i < kVector; i++) v[i] = widen(p[i]);
  return v;
#endif
}

template <class T>
inline Floats load_part(const T* p, int64_t count) {
  Floats v = {};
  for (int64_t i = 0; i < count; i++) v[i] = widen(p[i]);
  return v;
}

inline void store_narrow(Floats v, float* to) { memcpy(to, &v, sizeof v); }

inline void store_narrow(Floats v, BFloat16* to) {
  Words bits = (Words)v, rounded = (bits + (0x7fff + (bits >> 16 & 1))) >> 16;
  Halves half = __builtin_convertvector(v != v ? Words{} + 0x7fc0 : rounded, Halves);
  memcpy(to, &half, sizeof half);
}

inline void store_narrow(Floats v, Float16* to) {
#if defined(__AVX512F__) && SIRIUS_WIDTH == 16
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && SIRIUS_WIDTH == 8
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kVector; i++) narrow(v[i], to + i);
#endif
}

template <class V>
inline void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

template <class V>
inline V stored(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// The upper half is added to the lower one, until one number is left.
inline float sum(Floats v) {
#if defined(__AVX512F__) && SIRIUS_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int half = kVector / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}

// bfloat16 is widened two vectors at a time, faster than one: of 2 * kVector elements a shift widens the even ones and
// a mask the odd ones. The two vectors one after the other are the paired order. With n = kVector:
//
//   in memory, bfloat16       |  0 |  1 |  2 |  3 | ... | 2n-2 | 2n-1 |
//   half 0, bits << 16        |  0 |  2 |  4 | ... | 2n-2 |
//   half 1, bits & 0xffff0000 |  1 |  3 |  5 | ... | 2n-1 |
//   paired order, float       |  0 |  2 |  4 | ... | 2n-2 |  1 |  3 |  5 | ... | 2n-1 |
//
// Tokens that meet such rows, and their running sums, are kept in the paired order too. It covers the whole steps
// (kStep) of a row. Elements after the last whole step, and all of float32 and float16, stay in the order of memory.
template <class T>
constexpr bool kPaired = std::is_same_v<T, BFloat16>;

// Elements of a step through a row: whole cache lines and two vectors.
template <class T>
constexpr int64_t kStep = std::max<int64_t>(kLine / sizeof(T), 2 * kVector);

// The first or second of the two vectors that 2 * kVector elements widen to.
template <class T>
inline Floats load_half(const T* p, int half) {
  if constexpr (kPaired<T>) {
    Words bits;
    memcpy(&bits, p, sizeof bits);
    return (Floats)(half ? bits & 0xffff0000u : bits << 16);
  } else {
    return load(p + half * kVector);
  }
}

#if defined(__AVX512BF16__) || defined(SIRIUS_EMULATED)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// Whether T is multiplied as it is, pair by pair: bfloat16, where an instruction does so.
template <class T>
constexpr bool kDots = kPairs && std::is_same_v<T, BFloat16>;

inline Floats multiply_add(Floats sums, Floats a, Floats b) { return sums + a * b; }
inline Floats multiply_add(Floats sums, Floats a, float b) { return sums + a * b; }

inline Floats flush_denormals(Floats v) {
  Words bits = (Words)v, normal = (Words)((bits & 0x7fffffffu) >= 0x00800000u);
  return (Floats)(bits & (normal | 0x80000000u));
}

// Adds to each sum the products of two pairs of bfloat16. The instruction adds that of the upper ones and then that of
// the lower ones, rounds each sum to nearest, ties to even, and takes and gives denormals as zeros (Intel's manual,
// VDPBF16PS). The same by other instructions is for tests, on machines that lack it.
inline Floats multiply_add(Floats sums, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  auto add = [&](Words x, Words y) {
    sums = flush_denormals(sums + flush_denormals((Floats)x) * flush_denormals((Floats)y));
  };
  add(a & 0xffff0000u, b & 0xffff0000u);
  add(a << 16, b << 16);
  return sums;
#endif
}

inline Floats multiply_add(Floats sums, Words a, uint32_t b) { return multiply_add(sums, a, Words{} + b); }

}  // namespace

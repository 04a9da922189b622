// Weights rounded to 4 and 8 bits. quantized.py describes the format, and rounds to the same bits.

#pragma once

#include <vector>

#include "quantized.h"

namespace {

constexpr int64_t kScaleGroup = 32, kRowsTogether = 8;  // elements; rows of 4 bits
constexpr int kFirstStep = -3, kLastStep = 3;           // of the scales that are tried, as STEPS in quantized.py
constexpr int32_t kLastScale = 127, kLeastScale = 8;    // LAST and LEAST
constexpr int kSums = 4;                                // a group's elements i, i + 4, ... are added up in one sum

// kVector groups are searched side by side: element i of each of them is in vector i.
using Turned = Floats[kScaleGroup];

inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffff); }
inline Floats lesser(Floats a, Floats b) { return a < b ? a : b; }
inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }

// Turns kVector groups. Writes the codes from which the search for their scales starts: those of an eighth of the
// extreme.
inline void turn(const float* groups, Turned& to, int32_t* near) {
  Floats most = {};
  for (int64_t i = 0; i < kScaleGroup; i++) {
    for (int g = 0; g < kVector; g++) to[i][g] = groups[g * kScaleGroup + i];
    most = greater(magnitude(to[i]), most);
  }
  store(near, (Integers)(most * 0.125f) >> 20);
}

// The squared errors of groups that are rounded with scales and, in `negated`, with the scales' negatives. What is
// beyond 7 with a scale is beyond -7 with its negative. The maximum keeps a square and the sum after it from being
// fused, as those of the reference are not.
inline void errors_of(const Turned& x, Floats scale, Floats* straight, Floats* negated) {
  Floats inverse = 1 / scale, sums[2][kSums] = {};
  for (int64_t i = 0; i < kScaleGroup; i += kSums)
#pragma GCC unroll 4
    for (int j = 0; j < kSums; j++) {
      Floats value = x[i + j], whole = round_within(value * inverse, -8, 8);
      Floats one = value - lesser(whole, Floats{} + 7) * scale, other = value - greater(whole, Floats{} - 7) * scale;
      sums[0][j] += greater(one * one, Floats{});
      sums[1][j] += greater(other * other, Floats{});
    }
  *straight = (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
  *negated = (sums[1][0] + sums[1][2]) + (sums[1][1] + sums[1][3]);
}

// Writes the codes of the scales with which groups have the least error, of equal ones the first.
inline void choose_scales(const Turned& x, Integers near, Integers base, int32_t* codes) {
  Integers best = {};
  Floats least = Floats{} + std::numeric_limits<float>::infinity();
  for (int step = kFirstStep; step <= kLastStep; step++) {
    Integers code = near + step;
    code = code > 0 ? code : Integers{};
    code = code < kLastScale ? code : Integers{} + kLastScale;
    Floats straight, negated;
    errors_of(x, (Floats)((code << 20) + base), &straight, &negated);
    best = straight < least ? code : best;
    least = lesser(straight, least);
    best = negated < least ? code + 128 : best;
    least = lesser(negated, least);
  }
  store(codes, best);
}

// Writes a group's elements as a half of the bytes of its block.
inline void write_nibbles(const float* x, float scale, bool upper, uint8_t* to) {
  using Narrow = uint8_t __attribute__((vector_size(kVector)));
  float inverse = 1 / scale;
  for (int64_t i = 0; i < kScaleGroup; i += kVector) {
    Floats nibbles = round_within(load(x + i) * inverse, -8, 7) + 8;
    Narrow own = __builtin_convertvector(__builtin_convertvector(nibbles, Integers), Narrow);
    store(to + i, upper ? stored<Narrow>(to + i) | own << 4 : own);
  }
}

// Rounds some rows to 4 bits; all of their groups are searched together.
struct FourBits {
  int64_t groups;  // of a row
  std::vector<float> wide;
  std::vector<Floats> turned;
  std::vector<int32_t> near, base, codes;

  explicit FourBits(int64_t blocks) : groups(2 * blocks) {
    int64_t room = (kRowsTogether * groups + kVector - 1) / kVector * kVector;
    wide.resize(room * kScaleGroup), turned.resize(room * kScaleGroup / kVector);
    near.resize(room), base.resize(room), codes.resize(room);
  }

  float* row(int64_t r) { return wide.data() + r * groups * kScaleGroup; }
  Turned& group(int64_t g) { return *reinterpret_cast<Turned*>(turned.data() + g * kScaleGroup / kVector); }

  void round(int64_t rows, uint8_t* to, uint8_t* scales, int32_t* bases) {
    for (int64_t g = 0; g < rows * groups; g += kVector) turn(wide.data() + g * kScaleGroup, group(g), &near[g]);
    for (int64_t r = 0; r < rows; r++) {
      auto first = near.begin() + r * groups;
      int32_t most = groups ? *std::max_element(first, first + groups) : 0;
      int32_t lowest = std::max(most + kLastStep - kLastScale, kLeastScale);
      bases[r] = lowest << 20;
      std::fill_n(base.begin() + r * groups, groups, bases[r]);
      for (int64_t g = 0; g < groups; g++) first[g] -= lowest;
    }
    for (int64_t g = 0; g < rows * groups; g += kVector)
      choose_scales(group(g), stored<Integers>(&near[g]), stored<Integers>(&base[g]), &codes[g]);
    for (int64_t g = 0; g < rows * groups; g++) {
      int32_t bits = (((codes[g] & kLastScale) << 20) + base[g]) | (codes[g] & 128) << 24;
      float scale;
      memcpy(&scale, &bits, sizeof scale);
      scales[g] = uint8_t(codes[g]);
      write_nibbles(wide.data() + g * kScaleGroup, scale, g % 2, to + g / 2 * kScaleGroup);
    }
  }
};

// Rounds a row to 8 bits, with one scale.
inline void quantize_8(const float* x, int64_t blocks, uint8_t* codes, int32_t* base) {
  using Narrow = uint8_t __attribute__((vector_size(kVector)));
  Floats sizes = {};
  for (int64_t i = 0; i < blocks * kBlock; i += kVector) sizes = greater(magnitude(load(x + i)), sizes);
  float most = 0;
  for (int i = 0; i < kVector; i++) most = std::max(most, sizes[i]);
  float scale = std::max(most / 127, std::numeric_limits<float>::min());
  memcpy(base, &scale, sizeof scale);
  for (int64_t i = 0; i < blocks * kBlock; i += kVector) {
    Floats whole = round_within(load(x + i) / scale, -127, 127) + 128;
    store(codes + i, __builtin_convertvector(__builtin_convertvector(whole, Integers), Narrow));
  }
}

// Widens a row; what lies behind it up to a whole block is left as it is.
template <class T>
void widen_row(const Quantize& p, int64_t row, float* to) {
  const T* from = static_cast<const T*>(p.w) + row * p.stride;
  each_vector(p.width, [&](int64_t i, int64_t n) { store_some(load_some(from + i, n), n, to + i); });
}

template <class T>
void quantize_of(const Quantize& p) {
  int64_t blocks = (p.width + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(p.threads)
  {
    Share share(p.rows);
    FourBits four(p.bits == 4 ? blocks : 0);
    std::vector<float> wide(p.bits == 8 ? blocks * kBlock : 0);
    for (int64_t row = share.begin, rows = 1; row < share.end; row += rows) {
      if (p.bits == 4) {
        rows = std::min(kRowsTogether, share.end - row);
        for (int64_t r = 0; r < rows; r++) widen_row<T>(p, row + r, four.row(r));
        four.round(rows, p.codes + row * blocks * kBlockBytes<4>, p.scales + row * blocks * 2, p.base + row);
      } else {
        widen_row<T>(p, row, wide.data());
        quantize_8(wide.data(), blocks, p.codes + row * blocks * kBlockBytes<8>, p.base + row);
      }
    }
  }
}

}  // namespace

// Products with some rows of a weight matrix, memory-bound for few tokens and compute-bound for many.
//
// Compiled once for each instruction set (SIRIUS_ISA), with vectors of SIRIUS_WIDTH floats. A block of rows is taken at
// a time while the next block is fetched ahead: rows that are skipped would otherwise leave the hardware's prefetcher
// behind. Weights are widened to float on the way; all sums are float.

#include "rows.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int kVector = SIRIUS_WIDTH;
constexpr int kLine = 64;  // bytes of a cache line
using Floats = float __attribute__((vector_size(kVector * 4)));
using Words = uint32_t __attribute__((vector_size(kVector * 4)));
using Halves = uint16_t __attribute__((vector_size(kVector * 2)));

// Tiles of linear: weight rows x tokens whose sums stay in registers, 16 of them, or 32 with AVX-512.
constexpr int kTileRows = kVector == 16 ? 4 : 3;
constexpr int kTileTokens = kVector == 16 ? 6 : 4;
constexpr int kFewRows = 4;          // weight rows at a time where tokens are few
constexpr int64_t kSumBytes = 16384;  // of project's running sums: half of a first-level cache
constexpr int64_t kChunk = 128;       // least columns of project that a thread takes

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
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
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

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

float sum(Floats v) {
  for (int half = kVector / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

template <class T>
std::vector<float> widened(const T* x, int64_t count) {
  std::vector<float> wide(count);
  for (int64_t i = 0; i < count; i++) wide[i] = widen(x[i]);
  return wide;
}

// The pointers of a block of R rows; past the end the last row again.
template <class T, int R>
struct Block {
  const T* row[R];
  Block(const T* w, int64_t width, const int64_t* index, int64_t begin, int64_t end) {
    for (int r = 0; r < R; r++) {
      int64_t i = std::min(begin + r, end - 1);
      row[r] = w + (index ? index[i] : i) * width;
    }
  }
};

template <class T, int R, int M>
void dot_tile(const float* x, int64_t width, const Block<T, R>& w, const T* const* ahead, float (*dots)[R]) {
  constexpr int64_t step = kLine / sizeof(T);
  Floats acc[M][R] = {};
  auto at = [&](int64_t h) {
    Floats a[R];
    for (int r = 0; r < R; r++) a[r] = load(w.row[r] + h);
    for (int m = 0; m < M; m++) {
      Floats b = load(x + m * width + h);
      for (int r = 0; r < R; r++) acc[m][r] += a[r] * b;
    }
  };
  int64_t h = 0;
  for (; h + step <= width; h += step) {
    if (ahead)
      for (int r = 0; r < R; r++) __builtin_prefetch(ahead[r] + h);
#pragma GCC unroll 8
    for (int64_t v = 0; v < step; v += kVector) at(h + v);
  }
  for (; h + kVector <= width; h += kVector) at(h);
  if (h < width)
    for (int m = 0; m < M; m++) {
      Floats b = load_part(x + m * width + h, width - h);
      for (int r = 0; r < R; r++) acc[m][r] += load_part(w.row[r] + h, width - h) * b;
    }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) dots[m][r] = sum(acc[m][r]);
}

template <class T, int R>
void dot_tokens(const float* x, int64_t rows, int64_t width, const Block<T, R>& w, const Block<T, R>& next,
                float (*dots)[R]) {
  const T* const* ahead = next.row;
  for (int64_t m = 0; m < rows; ahead = nullptr) {
    const float* from = x + m * width;
    switch (std::min<int64_t>(rows - m, R == kTileRows ? kTileTokens : 2)) {
      case 1: dot_tile<T, R, 1>(from, width, w, ahead, dots + m); m += 1; break;
      case 2: dot_tile<T, R, 2>(from, width, w, ahead, dots + m); m += 2; break;
      case 3: dot_tile<T, R, 3>(from, width, w, ahead, dots + m); m += 3; break;
      case 4: dot_tile<T, R, 4>(from, width, w, ahead, dots + m); m += 4; break;
      case 5: dot_tile<T, R, 5>(from, width, w, ahead, dots + m); m += 5; break;
      default: dot_tile<T, R, 6>(from, width, w, ahead, dots + m); m += 6; break;
    }
  }
}

template <class T, int R>
void linear_blocks(const Linear& p, const float* x) {
  const T* w = static_cast<const T*>(p.w);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  int64_t blocks = (p.count + R - 1) / R;
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> dots(p.rows * R);
    auto by_row = reinterpret_cast<float (*)[R]>(dots.data());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      Block<T, R> now(w, p.width, p.index, b * R, p.count);
      Block<T, R> next(w, p.width, p.index, std::min(b + 1, blocks - 1) * R, p.count);
      dot_tokens<T, R>(x, p.rows, p.width, now, next, by_row);
      for (int64_t i = b * R; i < std::min((b + 1) * R, p.count); i++)
        for (int64_t m = 0; m < p.rows; m++)
          narrow(by_row[m][i - b * R] + (bias ? widen(bias[p.index ? p.index[i] : i]) : 0), y + m * p.count + i);
    }
  }
}

template <class T>
void linear_of(const Linear& p) {
  std::vector<float> x = widened(static_cast<const T*>(p.x), p.rows * p.width);
  if (p.rows > 2)
    linear_blocks<T, kTileRows>(p, x.data());
  else
    linear_blocks<T, kFewRows>(p, x.data());
}

// Adds z[m][0 .. R) times R rows to the sums of every token, `width` columns of them.
template <class T, int R>
void add_rows(const Block<T, R>& w, const T* const* ahead, const float* z, int64_t stride, int64_t rows, float* sums,
              int64_t width, int64_t first) {
  constexpr int64_t step = kLine / sizeof(T);
  auto add = [&](int64_t c, auto&& loaded, int64_t count) {
    Floats a[R];
    for (int r = 0; r < R; r++) a[r] = loaded(w.row[r] + first + c);
    for (int64_t m = 0; m < rows; m++) {
      float* to = sums + m * width + c;
      Floats s = count == kVector ? load(to) : load_part(to, count);
      for (int r = 0; r < R; r++) s += a[r] * z[m * stride + r];
      if (count == kVector)
        store(to, s);
      else
        memcpy(to, &s, count * 4);
    }
  };
  auto whole = [](const T* p) { return load(p); };
  int64_t c = 0;
  for (; c + step <= width; c += step) {
    for (int r = 0; r < R; r++) __builtin_prefetch(ahead[r] + first + c);
#pragma GCC unroll 8
    for (int64_t v = 0; v < step; v += kVector) add(c + v, whole, kVector);
  }
  for (; c + kVector <= width; c += kVector) add(c, whole, kVector);
  if (c < width) add(c, [&](const T* p) { return load_part(p, width - c); }, width - c);
}

template <class T>
void project_columns(const Project& p, const float* z, int64_t first, int64_t width) {
  constexpr int R = kFewRows;
  const T* w = static_cast<const T*>(p.w);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  std::vector<float> sums(p.rows * width);
  int64_t i = 0;
  for (; i + R <= p.count; i += R) {
    Block<T, R> now(w, p.width, p.index, i, p.count), next(w, p.width, p.index, std::min(i + R, p.count - 1), p.count);
    add_rows<T, R>(now, next.row, z + i, p.count, p.rows, sums.data(), width, first);
  }
  for (; i < p.count; i++) {
    Block<T, 1> now(w, p.width, p.index, i, p.count);
    add_rows<T, 1>(now, now.row, z + i, p.count, p.rows, sums.data(), width, first);
  }
  for (int64_t m = 0; m < p.rows; m++)
    for (int64_t c = 0; c < width; c++)
      narrow(sums[m * width + c] + (bias ? widen(bias[first + c]) : 0), y + m * p.width + first + c);
}

template <class T>
void project_of(const Project& p) {
  std::vector<float> z = widened(static_cast<const T*>(p.z), p.rows * p.count);
#pragma omp parallel num_threads(p.threads)
  {
    // As wide as the running sums allow: the longer the stretch of a row, the better memory streams.
    int64_t most = std::max<int64_t>(kLine, kSumBytes / 4 / p.rows / kLine * kLine);
    int64_t share = (p.width + omp_get_num_threads() - 1) / omp_get_num_threads();
    share = std::max(kChunk, (share + kLine - 1) / kLine * kLine);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < p.width; begin += share)
      for (int64_t c = begin; c < std::min(begin + share, p.width); c += most)
        project_columns<T>(p, z.data(), c, std::min({most, begin + share - c, p.width - c}));
  }
}

void linear(const Linear& p) {
  switch (p.dtype) {
    case kFloat32: return linear_of<float>(p);
    case kBFloat16: return linear_of<BFloat16>(p);
    case kFloat16: return linear_of<Float16>(p);
  }
}

void project(const Project& p) {
  switch (p.dtype) {
    case kFloat32: return project_of<float>(p);
    case kBFloat16: return project_of<BFloat16>(p);
    case kFloat16: return project_of<Float16>(p);
  }
}

}  // namespace

#define JOINED(a, b) a##b
#define NAMED(isa) JOINED(kernels_, isa)
#define QUOTED(isa) #isa
#define STRING(isa) QUOTED(isa)

extern const Kernels NAMED(SIRIUS_ISA) = {STRING(SIRIUS_ISA), linear, project};

// Products with some rows of a weight matrix, memory-bound for few tokens and compute-bound for many.
//
// Compiled once for each instruction set (SIRIUS_ISA), with vectors of SIRIUS_WIDTH floats. A block of rows is taken at
// a time while the next block is fetched ahead: rows that are skipped would otherwise leave the hardware's prefetcher
// behind. Weights are widened to float on the way; all sums are float.

#include "rows.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
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
constexpr int kFewRows = 4;                   // weight rows at a time where tokens are few
constexpr int64_t kStretch = 512;             // of the width, where they are many
constexpr int kPanelRows = 16, kPanel = 256;  // widened weights of project: half of a first-level cache
constexpr int64_t kChunk = 128;               // least columns of project that a thread takes

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

// bfloat16 is widened two vectors at a time, faster than one: the even elements of 2 * kVector by a shift, the odd ones
// by a mask. What they meet (tokens, running sums) is kept in that order, evens before odds, up to `paired` elements.
template <class T>
constexpr bool kPaired = std::is_same_v<T, BFloat16>;

template <class T>
int64_t paired(int64_t width) {
  constexpr int64_t step = kLine / sizeof(T);
  return kPaired<T> ? width / step * step : 0;
}

// Where an element stands in that order.
inline int64_t place(int64_t i, int64_t paired) {
  if (i >= paired) return i;
  int64_t within = i % (2 * kVector);
  return i - within + within / 2 + within % 2 * kVector;
}

inline Words load_pairs(const BFloat16* p) {
  Words bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}

inline Floats evens(Words bits) { return (Floats)(bits << 16); }
inline Floats odds(Words bits) { return (Floats)(bits & 0xffff0000u); }

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

// Adds the products of M tokens' x[begin .. end) with R rows to sums [M][R], a vector each.
template <class T, int R, int M>
void dot_tile(const float* x, int64_t width, const Block<T, R>& w, const T* const* ahead, int64_t begin, int64_t end,
              Floats (*sums)[R]) {
  constexpr int64_t step = kLine / sizeof(T);
  Floats acc[M][R];
  memcpy(acc, sums, sizeof acc);
  auto at = [&](int64_t h) {
    Floats a[R];
    for (int r = 0; r < R; r++) a[r] = load(w.row[r] + h);
    for (int m = 0; m < M; m++) {
      Floats b = load(x + m * width + h);
      for (int r = 0; r < R; r++) acc[m][r] += a[r] * b;
    }
  };
  auto at_pairs = [&](int64_t h) {
    if constexpr (kPaired<T>) {
      Words bits[R];
      for (int r = 0; r < R; r++) bits[r] = load_pairs(w.row[r] + h);
      for (int m = 0; m < M; m++) {
        Floats b = load(x + m * width + h), c = load(x + m * width + h + kVector);
        for (int r = 0; r < R; r++) acc[m][r] += evens(bits[r]) * b;
        for (int r = 0; r < R; r++) acc[m][r] += odds(bits[r]) * c;
      }
    }
  };
  int64_t h = begin;
  for (; h + step <= end; h += step) {
    if (ahead)
      for (int r = 0; r < R; r++) __builtin_prefetch(ahead[r] + h);
#pragma GCC unroll 8
    for (int64_t v = 0; v < step; v += kPaired<T> ? 2 * kVector : kVector) kPaired<T> ? at_pairs(h + v) : at(h + v);
  }
  for (; h + kVector <= end; h += kVector) at(h);
  if (h < end)
    for (int m = 0; m < M; m++) {
      Floats b = load_part(x + m * width + h, end - h);
      for (int r = 0; r < R; r++) acc[m][r] += load_part(w.row[r] + h, end - h) * b;
    }
  memcpy(sums, acc, sizeof acc);
}

template <class T, int R>
void dot_tokens(const float* x, int64_t tokens, int64_t width, const Block<T, R>& w, const T* const* ahead,
                int64_t begin, int64_t end, Floats (*sums)[R]) {
  switch (tokens) {
    case 1: return dot_tile<T, R, 1>(x, width, w, ahead, begin, end, sums);
    case 2: return dot_tile<T, R, 2>(x, width, w, ahead, begin, end, sums);
    case 3: return dot_tile<T, R, 3>(x, width, w, ahead, begin, end, sums);
    case 4: return dot_tile<T, R, 4>(x, width, w, ahead, begin, end, sums);
    case 5: return dot_tile<T, R, 5>(x, width, w, ahead, begin, end, sums);
    default: return dot_tile<T, R, 6>(x, width, w, ahead, begin, end, sums);
  }
}

// G blocks of R rows at a time, in stretches of the width: a stretch of a few tokens serves all blocks from the
// first-level cache.
template <class T, int R, int G>
void linear_groups(const Linear& p, const float* x, int64_t stretch, int64_t tile) {
  const T* w = static_cast<const T*>(p.w);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  int64_t groups = (p.count + R * G - 1) / (R * G);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<Floats> sums(G * p.rows * R);
    auto of = [&](int64_t g, int64_t m) { return reinterpret_cast<Floats(*)[R]>(&sums[(g * p.rows + m) * R]); };
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
      std::fill(sums.begin(), sums.end(), Floats{});
      int64_t first = group * R * G, blocks = std::min<int64_t>(G, (p.count - first + R - 1) / R);
      for (int64_t h = 0; h < p.width; h += stretch)
        for (int64_t m = 0; m < p.rows; m += tile)
          for (int64_t g = 0; g < blocks; g++) {
            Block<T, R> now(w, p.width, p.index, first + g * R, p.count);
            Block<T, R> next(w, p.width, p.index, std::min(first + (g + G) * R, p.count - 1), p.count);
            dot_tokens<T, R>(x + m * p.width, std::min(tile, p.rows - m), p.width, now, m ? nullptr : next.row, h,
                             std::min(h + stretch, p.width), of(g, m));
          }
      for (int64_t i = first; i < std::min(first + blocks * R, p.count); i++)
        for (int64_t m = 0; m < p.rows; m++) {
          float dot = sum((*of((i - first) / R, m))[(i - first) % R]);
          narrow(dot + (bias ? widen(bias[p.index ? p.index[i] : i]) : 0), y + m * p.count + i);
        }
    }
  }
}

template <class T>
void linear_of(const Linear& p) {
  std::vector<float> x(p.rows * p.width);
  for (int64_t m = 0; m < p.rows; m++) {
    const T* from = static_cast<const T*>(p.x) + m * p.width;
    float* to = x.data() + m * p.width;
    int64_t h = 0;
    if constexpr (kPaired<T>)
      for (; h < paired<T>(p.width); h += 2 * kVector) {
        Words bits = load_pairs(from + h);
        store(to + h, evens(bits));
        store(to + h + kVector, odds(bits));
      }
    for (; h < p.width; h++) to[h] = widen(from[h]);
  }
  if (p.rows > 2)
    linear_groups<T, kTileRows, 8>(p, x.data(), kStretch, kTileTokens);
  else
    linear_groups<T, kFewRows, 1>(p, x.data(), p.width, 2);
}

// Adds z[0 .. R) times R rows to the sums of one token.
template <class T, int R>
void add_rows(const Block<T, R>& w, const T* const* ahead, const float* z, float* sums, int64_t width) {
  constexpr int64_t step = kLine / sizeof(T);
  auto add = [&](int64_t c, auto&& loaded, int64_t count) {
    Floats s = count == kVector ? load(sums + c) : load_part(sums + c, count);
    for (int r = 0; r < R; r++) s += loaded(w.row[r] + c) * z[r];
    memcpy(sums + c, &s, count * 4);
  };
  auto whole = [](const T* p) { return load(p); };
  auto add_pairs = [&](int64_t c) {
    if constexpr (kPaired<T>) {
      Floats even = load(sums + c), odd = load(sums + c + kVector);
      for (int r = 0; r < R; r++) {
        Words bits = load_pairs(w.row[r] + c);
        even += evens(bits) * z[r];
        odd += odds(bits) * z[r];
      }
      store(sums + c, even);
      store(sums + c + kVector, odd);
    }
  };
  int64_t c = 0;
  for (; c + step <= width; c += step) {
    for (int r = 0; r < R; r++) __builtin_prefetch(ahead[r] + c);
#pragma GCC unroll 8
    for (int64_t v = 0; v < step; v += kPaired<T> ? 2 * kVector : kVector)
      kPaired<T> ? add_pairs(c + v) : add(c + v, whole, kVector);
  }
  for (; c + kVector <= width; c += kVector) add(c, whole, kVector);
  if (c < width) add(c, [&](const T* p) { return load_part(p, width - c); }, width - c);
}

template <class T>
void project_token(const Project& p, const float* z, const T* w, int64_t width, float* sums) {
  constexpr int R = kFewRows;
  int64_t i = 0;
  for (; i + R <= p.count; i += R) {
    Block<T, R> now(w, p.width, p.index, i, p.count), next(w, p.width, p.index, std::min(i + R, p.count - 1), p.count);
    add_rows<T, R>(now, next.row, z + i, sums, width);
  }
  for (; i < p.count; i++) {
    Block<T, 1> now(w, p.width, p.index, i, p.count);
    add_rows<T, 1>(now, now.row, z + i, sums, width);
  }
}

// Adds rows of a panel [rows, kPanel], weighed by z, to kPanel sums of M tokens: two vectors of them in registers.
template <int M>
void add_panel(const float* panel, int64_t rows, const float* z, int64_t stride, float* sums) {
  for (int64_t c = 0; c < kPanel; c += 2 * kVector) {
    Floats acc[M][2];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) acc[m][v] = load(sums + m * kPanel + c + v * kVector);
    for (int64_t r = 0; r < rows; r++) {
      Floats a = load(panel + r * kPanel + c), b = load(panel + r * kPanel + c + kVector);
      for (int m = 0; m < M; m++) {
        acc[m][0] += a * z[m * stride + r];
        acc[m][1] += b * z[m * stride + r];
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) store(sums + m * kPanel + c + v * kVector, acc[m][v]);
  }
}

// Some tokens at once: rows are widened into a panel, once for all tokens.
template <class T>
void project_tokens(const Project& p, const float* z, const T* w, int64_t width, float* sums) {
  alignas(kLine) float panel[kPanelRows * kPanel] = {};
  for (int64_t i = 0; i < p.count; i += kPanelRows) {
    int64_t rows = std::min<int64_t>(kPanelRows, p.count - i);
    for (int64_t r = 0; r < rows; r++) {
      auto row = [&](int64_t j) { return w + (p.index ? p.index[j] : j) * p.width; };
      const T *from = row(i + r), *ahead = row(std::min(i + r + kPanelRows, p.count - 1));
      int64_t c = 0;
      for (; c + kVector <= width; c += kVector) {
        __builtin_prefetch(ahead + c);
        store(panel + r * kPanel + c, load(from + c));
      }
      for (; c < width; c++) panel[r * kPanel + c] = widen(from[c]);
    }
    for (int64_t m = 0; m < p.rows;) {
      const float* weights = z + m * p.count + i;
      float* to = sums + m * kPanel;
      switch (std::min<int64_t>(p.rows - m, 4)) {
        case 1: add_panel<1>(panel, rows, weights, p.count, to); m += 1; break;
        case 2: add_panel<2>(panel, rows, weights, p.count, to); m += 2; break;
        case 3: add_panel<3>(panel, rows, weights, p.count, to); m += 3; break;
        default: add_panel<4>(panel, rows, weights, p.count, to); m += 4; break;
      }
    }
  }
}

template <class T>
void project_columns(const Project& p, const float* z, int64_t first, int64_t width) {
  const T* w = static_cast<const T*>(p.w) + first;
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  int64_t stride = p.rows == 1 ? width : kPanel;
  std::vector<float> sums(p.rows * stride);
  if (p.rows == 1)
    project_token(p, z, w, width, sums.data());
  else
    project_tokens(p, z, w, width, sums.data());
  int64_t swapped = p.rows == 1 ? paired<T>(width) : 0;
  for (int64_t m = 0; m < p.rows; m++)
    for (int64_t c = 0; c < width; c++)
      narrow(sums[m * stride + place(c, swapped)] + (bias ? widen(bias[first + c]) : 0), y + m * p.width + first + c);
}

template <class T>
void project_of(const Project& p) {
  std::vector<float> z = widened(static_cast<const T*>(p.z), p.rows * p.count);
#pragma omp parallel num_threads(p.threads)
  {
    // One token takes its columns in one stretch: the longer it is, the better memory streams.
    int64_t most = p.rows == 1 ? p.width : kPanel;
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

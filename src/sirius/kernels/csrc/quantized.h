// Products of tokens with weights of 4 and 8 bits. quantized.py describes the format of such weights.
//
// A token is rounded to 8 bits first, a block of 64 elements at a time. Four neighbouring elements are a quad: an
// instruction multiplies a quad's bytes and adds the four products up, exactly. A block's 16 quads are converted to
// float and multiplied by the scales of the weight and of the token before they are added to the row's sums.

#pragma once

#include <omp.h>

#include <memory>

#include "pointwise.h"
#include "readers.h"
#include "rows.h"

namespace {

constexpr int64_t kBlock = 64, kQuad = 4;   // elements
constexpr int64_t kSpan = 8;                // blocks whose scales are decoded together
constexpr int64_t kSpanScales = 2 * kSpan;  // one for each group of 32 elements
constexpr int kFourRows = 4;                // weight rows whose sums are added up together

#if defined(__AVX512VNNI__)
constexpr int kQuads = 16;  // of a vector
#elif defined(__AVX2__)
constexpr int kQuads = 8;
#else
constexpr int kQuads = 4;
#endif
constexpr int kParts = 16 / kQuads;         // vectors of a block
constexpr int64_t kBytes = kQuads * kQuad;  // of a vector

using Codes = uint8_t __attribute__((vector_size(kBytes)));
using QuadTotals = int32_t __attribute__((vector_size(kBytes)));
using QuadSums = float __attribute__((vector_size(kBytes)));
using Integers = int32_t __attribute__((vector_size(kVector * 4)));
using ScaleCodes = uint8_t __attribute__((vector_size(kSpanScales)));
using ScaleBits = uint32_t __attribute__((vector_size(kSpanScales * 4)));
using Scales = float __attribute__((vector_size(kSpanScales * 4)));

// Bytes of a block of a weight.
template <int bits>
constexpr int64_t kBlockBytes = kBlock * bits / 8;

// What is added to the codes of a weight, to make them unsigned, and is taken away again where the sums begin. AVX2
// multiplies signed bytes by another way, as its products of unsigned bytes of 8 bits would not fit.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <int bits>
constexpr int kOffset = bits == 4 ? 8 : 0;
#else
template <int bits>
constexpr int kOffset = bits == 4 ? 8 : 128;
#endif

// Weight rows that are multiplied side by side, by what was faster. Fewer rows are read in fewer places at a time, which
// helps where memory bounds a product. More rows share what is read of the tokens, and keep more sums going, which helps
// where arithmetic does. With AVX2 two tokens times four rows of 4 bits have more sums than there are registers.
template <int bits, int tokens>
constexpr int rows_beside() {
#if defined(__AVX512VNNI__)
  if (bits == 8) return tokens <= 2 ? 1 : kFourRows;
  return tokens == 1 ? 2 : kFourRows;
#elif defined(__AVX2__)
  if (bits == 8) return tokens == 1 ? 1 : kFourRows;
  return tokens == 2 ? 1 : kFourRows;
#else
  return kFourRows;
#endif
}

// Adds to each total the products of a quad's four codes with four elements of a token.
template <int bits>
[[gnu::always_inline]] inline QuadTotals multiply_quads(QuadTotals totals, Codes codes, const int8_t* x) {
#if defined(__AVX512VNNI__)
  return (QuadTotals)_mm512_dpbusd_epi32((__m512i)totals, (__m512i)codes, stored<__m512i>(x));
#elif defined(__AVX2__)
  __m256i values = stored<__m256i>(x), unsigned_codes = (__m256i)codes;
  if (bits == 8) {  // |code| * (x with the code's sign): at most 2 * 128 * 127, which 16 bits hold
    __m256i signed_codes = (__m256i)(codes ^ 0x80);
    unsigned_codes = _mm256_abs_epi8(signed_codes);
    values = _mm256_sign_epi8(values, signed_codes);
  }
  __m256i pairs = _mm256_maddubs_epi16(unsigned_codes, values);
  return totals + (QuadTotals)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  uint8_t own[kBytes];
  store(own, codes);
  for (int i = 0; i < kQuads; i++) {
    int total = 0;
    for (int j = 0; j < kQuad; j++) total += own[i * kQuad + j] * x[i * kQuad + j];
    totals[i] += total;
  }
  return totals;
#endif
}

// The codes of a part of a block.
template <int bits>
[[gnu::always_inline]] inline Codes codes_of(const uint8_t* block, int part) {
  if (bits == 8) return stored<Codes>(block + part * kBytes);
#if defined(__AVX512VNNI__)
  __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)block));
  __m512i shifted = _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
  return (Codes)_mm512_and_si512(shifted, _mm512_set1_epi8(15));
#else
  Codes both = stored<Codes>(block + part * kBytes % (kBlock / 2));
  return part * kBytes < kBlock / 2 ? both & 15 : both >> 4;
#endif
}

// The scale of each quad of a part, out of those of a span.
[[gnu::always_inline]] inline QuadSums scales_of(const float* span, int64_t block, int part) {
#if defined(__AVX512VNNI__)
  __m512i groups = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  groups = _mm512_add_epi32(groups, _mm512_set1_epi32(int(2 * block)));
  return (QuadSums)_mm512_permutexvar_ps(groups, _mm512_loadu_ps(span));
#else
  return QuadSums{} + span[2 * block + part * kQuads / 8];
#endif
}

// The scales of a span, as floats; see `scales_of` in quantized.py. A span that is not whole is read on into the next
// row, whose scales nothing uses, but not past `end`.
[[gnu::always_inline]] inline Scales decoded(const uint8_t* codes, const uint8_t* end, int32_t base) {
  ScaleCodes some = {};
  if (end - codes >= kSpanScales)
    some = stored<ScaleCodes>(codes);
  else
    memcpy(&some, codes, end - codes);
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  __m128i bytes = (__m128i)some;  // GCC would convert such vectors number by number
  __m256i halves[2] = {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  ScaleBits wide = stored<ScaleBits>(halves);
#else
  ScaleBits wide = __builtin_convertvector(some, ScaleBits);
#endif
  return (Scales)((((wide & 127) << 20) + uint32_t(base)) ^ (wide & 128) << 24);
}

// A block of a token: its elements, and where the totals of a product with it begin.
struct alignas(kLine) TokenBlock {
  int8_t values[kBlock];
  int32_t begin[kBlock / kQuad];
};

// Tokens rounded to 8 bits: [tokens, blocks] and the scale of each group [tokens, spans * kSpanScales].
struct Tokens {
  int64_t count, blocks, groups;
  std::unique_ptr<TokenBlock[]> values;
  std::unique_ptr<Scales[]> scales;

  Tokens(int64_t count, int64_t width)
      : count(count),
        blocks((width + kBlock - 1) / kBlock),
        groups((blocks + kSpan - 1) / kSpan * kSpanScales),
        values(new TokenBlock[count * blocks]),
        scales(new Scales[count * groups / kSpanScales]()) {}

  const TokenBlock* token(int64_t m) const { return values.get() + m * blocks; }
  float* scale(int64_t m) const { return reinterpret_cast<float*>(scales.get()) + m * groups; }
};

// The largest magnitude of a block, at least 2^-100. The bits of magnitudes are in their order, NaN above infinity.
inline float most_of(const float* x) {
  Integers most = Integers{} + 0x0d800000;
  for (int64_t i = 0; i < kBlock; i += kVector) {
    Integers bits = stored<Integers>(x + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = most[0];
  for (int i = 1; i < kVector; i++) largest = std::max(largest, most[i]);
  float value;
  memcpy(&value, &largest, sizeof value);
  return value;
}

// Rounds to the nearest whole number, ties to even, what lies between `least` and `most`; what does not is set there.
// The limits stand between a product and this sum, or the two would be fused and rounded once.
inline Floats round_within(Floats x, float least, float most) {
  constexpr float kRound = 0x1.8p23f;  // a sum with it is a whole number
  x = x > least ? x : Floats{} + least;
  x = x < most ? x : Floats{} + most;
  return (x + kRound) - kRound;
}

// Rounds a block of a token; see `rounded` in quantized.py.
template <int bits>
void round_block(const float* x, TokenBlock* to, float* scales) {
  using Narrow = int8_t __attribute__((vector_size(kVector)));
  float most = most_of(x), inverse = 1 / most * 127;
  for (int64_t i = 0; i < kBlock; i += kVector) {
    Floats whole = round_within(load(x + i) * inverse, -127, 127);
    store(to->values + i, __builtin_convertvector(__builtin_convertvector(whole, Integers), Narrow));
  }
  for (int part = 0; part < kParts; part++) {
    QuadTotals begin = {};
    if (kOffset<bits>)
      begin -= multiply_quads<bits>(begin, Codes{} + uint8_t(kOffset<bits>), to->values + part * kBytes);
    store(to->begin + part * kQuads, begin);
  }
  scales[0] = scales[1] = most <= std::numeric_limits<float>::max() ? most / 127 : NAN;
}

template <class T, int bits>
Tokens round_tokens(const void* from, int64_t count, int64_t width, int threads) {
  Tokens tokens(count, width);
#pragma omp parallel for num_threads(threads) if (count * width > kMany)
  for (int64_t m = 0; m < count; m++) {
    const T* x = static_cast<const T*>(from) + m * width;
    for (int64_t b = 0; b < tokens.blocks; b++) {
      alignas(kLine) float wide[kBlock] = {};
      each_vector(std::min(kBlock, width - b * kBlock), [&](int64_t i, int64_t n) {
        store(wide + i, load_some(x + b * kBlock + i, n));
      });
      round_block<bits>(wide, tokens.values.get() + m * tokens.blocks + b, tokens.scale(m) + 2 * b);
    }
  }
  return tokens;
}

// Where the codes and scales of a row are.
template <int bits>
struct QuantizedRow {
  const uint8_t *codes, *scales, *end;  // end: of the scales of all rows
  int32_t base;

  QuantizedRow() = default;
  QuantizedRow(const QuantizedWeight& weight, int64_t row, int64_t blocks)
      : codes(weight.codes + row * blocks * kBlockBytes<bits>),
        scales(bits == 4 ? weight.scales + row * blocks * 2 : nullptr),
        end(bits == 4 ? weight.scales + weight.height * blocks * 2 : nullptr),
        base(weight.base[row]) {}
};

// The dot products of M tokens with R rows; the rows `ahead` are fetched meanwhile. sums [M, kFourRows], of which the
// first R of each token are written.
template <int bits, int M, int R>
void dot_quantized(const Tokens& x, int64_t token, const QuantizedRow<bits>* row, const QuantizedRow<bits>* ahead,
                   QuadSums* sums) {
  QuadSums acc[M][R] = {};
  auto fetch = [&](int64_t at) __attribute__((always_inline)) {  // one of the rows' lines, row after row
    int64_t bytes = x.blocks * kBlockBytes<bits>, r = 0;
    for (; r + 1 < R && at >= bytes; r++) at -= bytes;
    __builtin_prefetch(ahead[r].codes + at);
  };
  for (int64_t span = 0; span < x.blocks; span += kSpan) {
    int64_t blocks = std::min(kSpan, x.blocks - span);
    Scales products[M][bits == 4 ? R : 1];
    for (int m = 0; m < M; m++) {
      Scales own = stored<Scales>(x.scale(token + m) + 2 * span);
      if (bits == 8) products[m][0] = own;
      if (bits == 4)
        for (int r = 0; r < R; r++) products[m][r] = own * decoded(row[r].scales + 2 * span, row[r].end, row[r].base);
    }
    if (bits == 4 && ahead)
      for (int r = 0; r < R; r++) __builtin_prefetch(ahead[r].scales + 2 * span);
    for (int64_t b = 0; b < blocks; b++) {
      int64_t at = (span + b) * kBlockBytes<bits>;
      if (ahead && at % kLine == 0)
        for (int r = 0; r < R; r++) fetch(at * R + r * kLine);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          Codes codes = codes_of<bits>(row[r].codes + at, part);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            const TokenBlock& block = x.token(token + m)[span + b];
            QuadTotals begin = kOffset<bits> ? stored<QuadTotals>(block.begin + part * kQuads) : QuadTotals{};
            QuadTotals totals = multiply_quads<bits>(begin, codes, block.values + part * kBytes);
            const float* scales = reinterpret_cast<const float*>(&products[m][bits == 4 ? r : 0]);
            acc[m][r] += __builtin_convertvector(totals, QuadSums) * scales_of(scales, b, part);
          }
        }
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) sums[m * kFourRows + r] = acc[m][r];
}

// Adds each of four vectors up. Short rows notice how long this takes, so vectors of AVX are added up side by side.
[[gnu::always_inline]] inline void add_up(const QuadSums* sums, float* totals) {
  static_assert(kFourRows == 4);
#if defined(__AVX2__)
  __m256 part[4];
  for (int r = 0; r < 4; r++) {
#if defined(__AVX512VNNI__)
    __m512 all = (__m512)sums[r];
    part[r] = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
    part[r] = (__m256)sums[r];
#endif
  }
  __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
#else
  for (int r = 0; r < 4; r++) totals[r] = (sums[r][0] + sums[r][2]) + (sums[r][1] + sums[r][3]);
#endif
}

// Writes the products of a token with the rows from `first` on to y [count].
template <int bits, class T>
[[gnu::always_inline]] inline void write_quantized(const QuantizedProduct& p, const QuantizedWeight& weight,
                                                   const QuantizedRow<bits>* row, const QuadSums* sums, int64_t first,
                                                   T* y) {
  float totals[kFourRows];
  add_up(sums, totals);
#pragma GCC unroll 4
  for (int r = 0; r < kFourRows; r++) {
    int64_t i = first + r;
    if (i >= p.count) break;
    float dot = totals[r], scale;
    memcpy(&scale, &row[r].base, sizeof scale);
    if (bits == 8) dot *= scale;
    if (weight.bias) dot += widen(static_cast<const T*>(weight.bias)[p.index ? p.index[i] : i]);
    narrow(dot, y + i);
  }
}

// Writes the products of all tokens with the rows of a share of the tiles.
template <class T, int bits>
void multiply_share(const QuantizedProduct& p, const QuantizedWeight& weight, const Tokens& x, Share share, T* y) {
  constexpr int R = kFourRows;
  int64_t bytes = x.blocks * kBlockBytes<bits>, distance = R * (1 + kStream / std::max<int64_t>(R * bytes, 1));
  auto row_at = [&](int64_t i) {
    i = std::min(i, p.count - 1);
    return QuantizedRow<bits>(weight, p.index ? p.index[i] : i, x.blocks);
  };
  for (int64_t first = share.begin * R; first < std::min(share.end * R, p.count); first += R) {
    QuantizedRow<bits> row[R], ahead[R];
    for (int r = 0; r < R; r++) row[r] = row_at(first + r), ahead[r] = row_at(first + r + distance);
    for (int64_t token = 0; token < p.rows; token += kTileTokens)
      for_tokens(p.rows - token, [&](auto M) __attribute__((always_inline)) {
        constexpr int beside = rows_beside<bits, M>();
        QuadSums sums[M * R];
        for (int r = 0; r < R; r += beside)
          dot_quantized<bits, M, beside>(x, token, row + r, token ? nullptr : ahead + r, sums + r);
        for (int m = 0; m < M; m++) write_quantized<bits>(p, weight, row, sums + m * R, first, y + (token + m) * p.count);
      });
  }
}

template <class T, int bits>
void quantized_bits(const QuantizedProduct& p) {
  Tokens x = round_tokens<T, bits>(p.x, p.rows, p.width, p.threads);
  T* y = static_cast<T*>(p.y);
  std::unique_ptr<T[]> other(new T[p.up.codes ? p.rows * p.count : 0]);
#pragma omp parallel num_threads(p.threads)
  {
    Share share((p.count + kFourRows - 1) / kFourRows);
    multiply_share<T, bits>(p, p.weight, x, share, y);
    if (p.up.codes) {
      multiply_share<T, bits>(p, p.up, x, share, other.get());
      int64_t begin = share.begin * kFourRows, end = std::min(share.end * kFourRows, p.count);
      for (int64_t at = begin; at < begin + p.rows * p.count; at += p.count)
        activate_some(p.kind, y + at, other.get() + at, end - begin, y + at);
    }
  }
}

template <class T>
void quantized_of(const QuantizedProduct& p) {
  if (!p.rows) return;
  if (p.bits == 4)
    quantized_bits<T, 4>(p);
  else
    quantized_bits<T, 8>(p);
}

}  // namespace

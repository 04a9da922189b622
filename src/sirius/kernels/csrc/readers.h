// How the products read rows of a weight: which of them a thread does, where they lie, and what makes a vector.

#pragma once

#include <omp.h>

#include <algorithm>

#include "formats.h"

namespace {

constexpr int64_t kAhead = kVector == 16 ? 1024 : 512;  // bytes of a row that are fetched ahead, best on such CPUs
constexpr int64_t kStream = 8192;                       // the same where rows are one stream

// Tiles whose sums stay in registers (16, or 32 with AVX-512): tokens x weight rows (linear) or vectors (project).
constexpr int kTileTokens = 4, kTile = kVector == 16 ? 6 : 3;
constexpr int kStreamTokens = 12;  // most tokens that meet rows which are one stream
constexpr int64_t kBatch = 16;     // tokens that share a panel or strip
constexpr int kFewRows = 4;        // weight rows at a time where tokens are few

// Calls a function with the number of tokens that are left as a constant, at most `most`. Functions given here say
// always_inline: where GCC is left to decide, some loops take up to 5% longer. each.h has a switch of its own: even with
// always_inline it was 4% slower by this function.
template <int most = kTileTokens, class Function>
[[gnu::always_inline]] inline void for_tokens(int64_t left, Function function) {
  if constexpr (most > 1)
    if (left < most) return for_tokens<most - 1>(left, function);
  function(std::integral_constant<int, most>{});
}

// This thread's part of some pieces of work.
struct Share {
  int64_t begin, end;
  explicit Share(int64_t pieces)
      : begin(omp_get_thread_num() * pieces / omp_get_num_threads()),
        end((omp_get_thread_num() + 1) * pieces / omp_get_num_threads()) {}
};

// The rows of a product; past the end the last one again.
template <class T>
struct Rows {
  const T* w;
  int64_t stride, count;
  const int64_t* index;

  const T* operator[](int64_t i) const {
    i = std::min(i, count - 1);
    return w + (index ? index[i] : i) * stride;
  }
};

// Fetches what lies kAhead bytes beyond a step of a row, going on in the next one. GCC drops calls of a function that
// only fetches, as if it did nothing, unless they are put inline at once.
template <class T>
[[gnu::always_inline]] inline void fetch_ahead(const T* row, const T* next, int64_t at, int64_t width) {
  constexpr int64_t ahead = kAhead / sizeof(T), line = kLine / sizeof(T);
  for (int64_t i = at + ahead; i < at + ahead + kStep<T>; i += line)
    __builtin_prefetch(i < width ? row + i : next + i - width);
}

// Fetches a row's first line, long before the rest: its page is then known, and the hardware's prefetcher on its way.
template <class T>
[[gnu::always_inline]] inline void fetch_first(const T* row) {
  __builtin_prefetch(row, 0, 2);
}

// A reader gives vectors of some columns. `half` is one of the kHalves vectors that 2 * kVector columns make; two of
// them are in the paired order of formats.h. `whole` is a vector in the order of memory, and `part` the first `count`
// columns and zeros. Copies of them, and what meets them, are arrays of Element.

// One row, widened.
template <class T>
struct Widened {
  using Format = T;
  using Element = float;
  using Vector = Floats;
  static constexpr int kRows = 1, kHalves = 2;
  static constexpr int64_t kLanes = kVector;  // columns of a vector
  const T* row;

  static Widened at(const Rows<T>& rows, int64_t i, int64_t column) { return {rows[i] + column}; }
  Floats half(int64_t c, int half) const { return load_half(row + c, half); }
  Floats whole(int64_t c) const { return load(row + c); }
  Floats part(int64_t c, int64_t count) const { return load_part(row + c, count); }
  [[gnu::always_inline]] void fetch() const { fetch_first(row); }
  [[gnu::always_inline]] void fetch(const Widened& next, int64_t c, int64_t width) const {
    fetch_ahead(row, next.row, c, width);
  }
};

// One row as it is: pairs of neighbours, for dot products.
struct Neighbours {
  using Format = BFloat16;
  using Element = BFloat16;
  using Vector = Words;
  static constexpr int kRows = 1, kHalves = 1;
  static constexpr int64_t kLanes = 2 * kVector;
  const BFloat16* row;

  static Neighbours at(const Rows<BFloat16>& rows, int64_t i, int64_t column) { return {rows[i] + column}; }
  Words half(int64_t c, int) const { return whole(c); }
  Words whole(int64_t c) const { return stored<Words>(row + c); }
  Words part(int64_t c, int64_t count) const {
    Words pairs = {};
    memcpy(&pairs, row + c, count * sizeof(BFloat16));
    return pairs;
  }
  [[gnu::always_inline]] void fetch(const Neighbours& next, int64_t c, int64_t width) const {
    fetch_ahead(row, next.row, c, width);
  }
};

// Two rows as they are: pairs of a column, for sums of rows; in place of the second one zeros if the first is `alone`.
template <bool alone>
struct Stacked {
  using Format = BFloat16;
  using Element = uint32_t;
  using Vector = Words;
  static constexpr int kRows = 2, kHalves = 2;
  static constexpr int64_t kLanes = kVector;
  const BFloat16 *row, *second;

  static Stacked at(const Rows<BFloat16>& rows, int64_t i, int64_t column) {
    return {rows[i] + column, rows[i + 1] + column};
  }
  Words half(int64_t c, int half) const {
    Words low = stored<Words>(row + c), high = alone ? Words{} : stored<Words>(second + c);
    return half ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
  }
  Words whole(int64_t c) const {
    Words low = (Words)load(row + c), high = alone ? Words{} : (Words)load(second + c);
    return low >> 16 | high;
  }
  Words part(int64_t c, int64_t count) const {
    Words low = (Words)load_part(row + c, count), high = alone ? Words{} : (Words)load_part(second + c, count);
    return low >> 16 | high;
  }
  [[gnu::always_inline]] void fetch() const {
    fetch_first(row);
    if (!alone) fetch_first(second);
  }
  [[gnu::always_inline]] void fetch(const Stacked& next, int64_t c, int64_t width) const {
    fetch_ahead(row, next.row, c, width);
    if (!alone) fetch_ahead(second, next.second, c, width);
  }
};

// Writes `count` columns to `to`, and zeros up to a whole vector. Whole steps are in the order of `half`.
template <class Row>
inline void unpack(const Row& row, int64_t count, typename Row::Element* to) {
  constexpr int64_t step = kStep<typename Row::Format>;
  int64_t c = 0;
  for (; c + step <= count; c += step)
#pragma GCC unroll 8
    for (int64_t v = 0; v < step; v += 2 * kVector)
      for (int half = 0; half < Row::kHalves; half++) store(to + c + v + half * kVector, row.half(c + v, half));
  for (; c + Row::kLanes <= count; c += Row::kLanes) store(to + c, row.whole(c));
  if (c < count) store(to + c, row.part(c, count - c));
}

}  // namespace

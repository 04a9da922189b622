// Dot products of tokens with rows of a weight.

#pragma once

#include <unistd.h>

#include <array>
#include <vector>

#include "amx_linear.h"
#include "readers.h"
#include "rows.h"

namespace {

constexpr int64_t kGroup = 12, kStretch = 256;  // rows x columns that meet a batch in the cache

template <class T>
using DotRow = std::conditional_t<kDots<T>, Neighbours, Widened<T>>;

// Writes what a row's products with a token add up to.
template <class T>
[[gnu::always_inline]] inline void write_dot(const Linear& p, int64_t token, int64_t i, Floats sums) {
  const T* bias = static_cast<const T*>(p.bias);
  float dot = sum(sums) + (bias ? widen(bias[p.index ? p.index[i] : i]) : 0);
  narrow(dot, static_cast<T*>(p.y) + token * p.count + i);
}

// The products of M tokens with R rows; `fetch` is called at each step. Tokens are `stride` apart or, if
// `mixed`, take turns of kLanes numbers each.
template <int R, int M, bool mixed = false, class Row, class Fetch>
void dot_rows(const typename Row::Element* x, int64_t stride, const Row* row, int64_t width, Floats (*sums)[R],
              Fetch fetch) {
  using Vector = typename Row::Vector;
  constexpr int64_t step = kStep<typename Row::Format>;
  Floats acc[M][R] = {};
  auto add = [&](int64_t h, auto&& loaded) {
    Vector a[R];
    for (int r = 0; r < R; r++) a[r] = loaded(row[r]);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      Vector b = stored<Vector>(mixed ? x + h * M + m * Row::kLanes : x + m * stride + h);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[m][r] = multiply_add(acc[m][r], a[r], b);
    }
  };
  int64_t h = 0;
  for (; h + step <= width; h += step) {
    fetch(h);
#pragma GCC unroll 8
    for (int64_t v = h; v < h + step; v += 2 * kVector) {  // a loop over the halves inside takes 5% longer
      add(v, [&](const Row& from) { return from.half(v, 0); });
      if constexpr (Row::kHalves == 2) add(v + kVector, [&](const Row& from) { return from.half(v, 1); });
    }
  }
  for (; h + Row::kLanes <= width; h += Row::kLanes) add(h, [&](const Row& from) { return from.whole(h); });
  if (h < width) add(h, [&](const Row& from) { return from.part(h, width - h); });
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[m][r] = acc[m][r];
}

// R rows from `first` on, `apart` rows from each other.
template <class T, int R, class Row = DotRow<T>>
std::array<Row, R> rows_from(const Rows<T>& rows, int64_t first, int64_t apart = 1) {
  std::array<Row, R> row;
  for (int r = 0; r < R; r++) row[r] = Row::at(rows, first + r * apart, 0);
  return row;
}

// Writes the products of M tokens from `token` on with such rows, those before `end`.
template <class T, int R, int M>
void write_dots(const Linear& p, int64_t token, int64_t first, int64_t apart, int64_t end, const Floats (*sums)[R]) {
  for (int64_t r = 0; r < R && first + r * apart < end; r++)
    for (int m = 0; m < M; m++) write_dot<T>(p, token + m, first + r * apart, sums[m][r]);
}

// Few tokens: every row is read once, with what follows it fetched ahead. A thread's rows are read in several places
// side by side, each a long run, as a run's end costs.
template <class T, int M>
void linear_few(const Linear& p, const typename DotRow<T>::Element* x, int64_t stride) {
  constexpr int R = kFewRows;
#pragma omp parallel num_threads(p.threads)
  {
    Share share(p.count);
    Rows<T> rows{static_cast<const T*>(p.w), p.stride, share.end, p.index};
    int64_t run = (share.end - share.begin + R - 1) / R;
    for (int64_t first = share.begin; first < share.begin + run; first++) {
      auto row = rows_from<T, R>(rows, first, run), next = rows_from<T, R>(rows, first + 1, run);
      auto fetch = [&](int64_t h) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) row[r].fetch(next[r], h, p.width);
      };
      Floats sums[M][R];
      dot_rows<R, M>(x, stride, row.data(), p.width, sums, fetch);
      write_dots<T, R, M>(p, 0, first, run, share.end, sums);
    }
  }
}

// Up to kStreamTokens tokens, which are mixed: a thread reads its rows, which lie together, as one stream.
template <class T>
void linear_stream(const Linear& p, const typename DotRow<T>::Element* x) {
#pragma omp parallel num_threads(p.threads)
  for_tokens<kStreamTokens>(p.rows, [&](auto M) __attribute__((always_inline)) {
    Share share(p.count);
    Rows<T> rows{static_cast<const T*>(p.w), p.stride, p.count, nullptr};
    for (int64_t first = share.begin; first < share.end; first++) {
      auto row = rows_from<T, 1>(rows, first);
      Floats sums[M][1];
      dot_rows<1, M, true>(x, 0, row.data(), p.width, sums, [&](int64_t h) __attribute__((always_inline)) {
        __builtin_prefetch(row[0].row + h + kStream / sizeof(T));
      });
      write_dots<T, 1, M>(p, 0, first, 1, share.end, sums);
    }
  });
}

// Bytes of tokens that stay in the first-level cache while a stream passes through it, which needs the rest.
inline int64_t stream_bytes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL1_DCACHE_SIZE), 32 * 1024);  // 0 where not known
#else
  constexpr int64_t cache = 32 * 1024;
#endif
  return cache * 7 / 10;
}

// The products of M tokens from `token` on with rows, while a share of the next ones is fetched: from column `begin` on
// one line in every `every` steps; nothing where that is 0.
template <class T, int M, class Rows, class Element = typename DotRow<T>::Element>
void linear_tile(const Linear& p, const Element* x, int64_t stride, int64_t token, int64_t first, const Rows& row,
                 const Rows& next, int64_t begin, int64_t every) {
  int64_t wait = 0;
  Floats sums[M][kTile];
  auto fetch = [&](int64_t) __attribute__((always_inline)) {
    if (--wait >= 0) return;
    for (const auto& each : next) __builtin_prefetch(each.row + begin);
    wait = every - 1, begin += kStep<T>;
  };
  if (every)
    dot_rows<kTile, M>(x + token * stride, stride, row.data(), p.width, sums, fetch);
  else
    dot_rows<kTile, M>(x + token * stride, stride, row.data(), p.width, sums, [](int64_t) {});
  write_dots<T, kTile, M>(p, token, first, 1, p.count, sums);
}

// Many tokens, rows that are multiplied as they are: tiles of both, the next rows fetched throughout.
template <class T>
void linear_tiles(const Linear& p, const typename DotRow<T>::Element* x, int64_t stride) {
  Rows<T> rows{static_cast<const T*>(p.w), p.stride, p.count, p.index};
  int64_t tiles = (p.rows + kTileTokens - 1) / kTileTokens;
  int64_t sharing = std::min<int64_t>(tiles, 4);  // tiles that fetch the next rows
  int64_t steps = p.width / kStep<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t first = 0; first < p.count; first += kTile) {
    auto row = rows_from<T, kTile>(rows, first), next = rows_from<T, kTile>(rows, first + kTile);
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t token = tile * kTileTokens, begin = tile * steps / sharing * kStep<T>;
      for_tokens(p.rows - token, [&](auto M) __attribute__((always_inline)) {
        linear_tile<T, M>(p, x, stride, token, first, row, next, begin, tile < sharing ? sharing : 0);
      });
    }
  }
}

// Adds the products of M tokens' x with a panel of kTile rows, over a stretch of the width. A whole stretch of rows
// that are still to be read, and `ahead` of them the next to fetch, is written to the panel on the way.
template <int M, class T>
void dot_tile(const float* x, float* panel, int64_t width, Floats (*sums)[kTile], const Widened<T>* row = nullptr,
              const Widened<T>* ahead = nullptr) {
  Floats acc[M][kTile];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int r = 0; r < kTile; r++) acc[m][r] = sums[m][r];
  auto add = [&](int64_t h, auto&& loaded) {
    Floats a[kTile];
    for (int r = 0; r < kTile; r++) a[r] = loaded(r);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      Floats b = load(x + m * kStretch + h);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; r++) acc[m][r] = multiply_add(acc[m][r], a[r], b);
    }
  };
  auto held = [&](int64_t h) { return [=](int r) { return load(panel + r * kStretch + h); }; };
  auto fresh = [&](int64_t h, int half) {
    return [=](int r) {
      Floats a = row[r].half(h, half);
      store(panel + r * kStretch + h + half * kVector, a);
      return a;
    };
  };
  if (row)
    for (int64_t h = 0; h < kStretch; h += 2 * kVector) {
      for (int r = 0; r < kTile; r++) __builtin_prefetch(ahead[r].row + h);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) add(h + half * kVector, fresh(h, half));
    }
  else if (width == kStretch)  // a loop of known length takes a tenth less time
    for (int64_t h = 0; h < kStretch; h += kVector) add(h, held(h));
  else
    for (int64_t h = 0; h < width; h += kVector) add(h, held(h));
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int r = 0; r < kTile; r++) sums[m][r] = acc[m][r];
}

template <class T, class... Fresh>
void dot_tokens(const float* x, int64_t tokens, float* panel, int64_t width, Floats (*sums)[kTile], Fresh... fresh) {
  for_tokens(tokens, [&](auto M) __attribute__((always_inline)) { dot_tile<M, T>(x, panel, width, sums, fresh...); });
}

// The products of kGroup rows from `first` on with some tokens, stretch by stretch of the width.
template <class T>
void linear_rows(const Linear& p, const float* x, int64_t token, int64_t tokens, int64_t first) {
  using Row = Widened<T>;
  alignas(kLine) float panel[kTile * kStretch];
  Floats sums[kGroup / kTile][kBatch][kTile] = {};
  Rows<T> rows{static_cast<const T*>(p.w), p.stride, p.count, p.index};
  for (int64_t h = 0; h < p.width; h += kStretch) {
    int64_t width = std::min(kStretch, p.width - h);
    int64_t whole = (width + kVector - 1) / kVector * kVector;
    const float* at = x + h * p.rows + token * kStretch;
    for (int64_t g = 0; g < kGroup / kTile; g++) {
      Row row[kTile], ahead[kTile];
      for (int64_t r = 0, i = first + g * kTile; r < kTile; r++, i++) {
        row[r] = Row::at(rows, i, h);
        ahead[r] = h + kStretch < p.width ? Row::at(rows, i, h + kStretch) : Row::at(rows, i + kGroup, 0);
        if (width < kStretch) unpack(row[r], width, panel + r * kStretch);
      }
      int64_t m = 0;
      if (width == kStretch) {
        dot_tokens<T>(at, tokens, panel, width, sums[g], row, ahead);
        m += kTileTokens;
      }
      for (; m < tokens; m += kTileTokens) dot_tokens<T>(at + m * kStretch, tokens - m, panel, whole, sums[g] + m);
    }
  }
  for (int64_t r = 0; r < std::min(kGroup, p.count - first); r++)
    for (int64_t m = 0; m < tokens; m++) write_dot<T>(p, token + m, first + r, sums[r / kTile][m][r % kTile]);
}

// Many tokens, rows that are widened first: a few of them at a time, for all tokens.
template <class T>
void linear_panels(const Linear& p, const float* x) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t first = 0; first < p.count; first += kGroup)
    for (int64_t m = 0; m < p.rows; m += kBatch) linear_rows<T>(p, x, m, std::min(kBatch, p.rows - m), first);
}

// Tokens as they are multiplied: [stretches of the width, tokens, stretch].
template <class T, class Row = DotRow<T>>
std::vector<typename Row::Vector> unpack_tokens(const Linear& p, int64_t stretch) {
  std::vector<typename Row::Vector> x((p.width + stretch - 1) / stretch * stretch * p.rows / Row::kLanes);
  for (int64_t m = 0; m < p.rows; m++)
    for (int64_t h = 0; h < p.width; h += stretch)
      unpack(Row{static_cast<const T*>(p.x) + m * p.width + h}, std::min(stretch, p.width - h),
             reinterpret_cast<typename Row::Element*>(x.data()) + h * p.rows + m * stretch);
  return x;
}

// The table in rows.h says which way runs when.
template <class T, class Row = DotRow<T>>
void linear_of(const Linear& p) {
  if (!p.rows) return;
  if constexpr (kTiles<T>) return amx_linear(p);
  int64_t width = (p.width + Row::kLanes - 1) / Row::kLanes * Row::kLanes;
  bool packed = kDots<T> && !p.index && p.stride == p.width, few = !packed && p.rows <= 2;
  bool near = p.rows <= kStreamTokens && p.rows * width * int64_t(sizeof(T)) <= stream_bytes();
  bool stream = packed && (p.rows <= kTileTokens || near);
  int64_t stretch = stream ? Row::kLanes : few || kDots<T> ? width : kStretch;
  auto unpacked = unpack_tokens<T>(p, stretch);
  const auto* x = reinterpret_cast<const typename Row::Element*>(unpacked.data());
  if (few) return for_tokens<2>(p.rows, [&](auto M) __attribute__((always_inline)) { linear_few<T, M>(p, x, stretch); });
  if constexpr (kDots<T>) {
    if (stream) return linear_stream<T>(p, x);
    linear_tiles<T>(p, x, stretch);
  } else {
    linear_panels<T>(p, x);
  }
}

}  // namespace

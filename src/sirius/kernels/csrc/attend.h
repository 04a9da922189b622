// Attention of a few tokens over the slots of a cache, read where they lie and once for all heads that share them.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "pointwise.h"
#include "readers.h"

namespace {

constexpr int64_t kPart = 512;  // slots of a piece of work; the pieces' sums are joined in turn
constexpr int64_t kSlots = 32;  // slots that meet all queries in the cache
constexpr int64_t kLines = 8;   // of those at a time, widened
constexpr uint32_t kEvery = (1 << kLines) - 1;
constexpr int kQueries = 4;     // queries of a tile
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// The heads of all tokens that share a head of keys and values. Queries of one token are neighbours.
struct Group {
  const Attend& p;
  int64_t row, kv_head;

  int64_t shared() const { return p.heads / p.kv_heads; }
  int64_t queries() const { return shared() * p.tokens; }
  int64_t token(int64_t query) const { return query / shared(); }
  int64_t head(int64_t query) const { return kv_head * shared() + query % shared(); }

  // Which of the slots first .. first + count - 1 a token sees, a bit for each.
  uint32_t sees(int64_t token, int64_t first, int64_t count) const {
    const uint8_t* seen = p.seen + (row * p.tokens + token) * p.after;
    int64_t after = first - p.held[row], held = std::clamp<int64_t>(-after, 0, count);
    uint32_t bits = uint32_t((uint64_t(1) << held) - 1);
    for (int64_t s = held; s < std::min(count, p.after - after); s++) bits |= uint32_t(seen[after + s] != 0) << s;
    return bits;
  }
};

// What the queries of a group have summed up over some slots: the largest score, and relative to it the weights' sum,
// 0 before the first slot, and the weighed values.
struct Sums {
  int64_t size;
  float* at;
  static int64_t length(int64_t size) { return size + 2; }
  float& largest(int64_t query) const { return at[query * length(size)]; }
  float& weight(int64_t query) const { return at[query * length(size) + 1]; }
  float* values(int64_t query) const { return at + query * length(size) + 2; }
};

// Widened lines of a whole number of steps: elements in the order of `half`, zeros after them.
inline int64_t padded(int64_t size) { return (size + 2 * kVector - 1) / (2 * kVector) * (2 * kVector); }

template <class T>
void widen_line(const T* from, int64_t size, float* to) {
  int64_t whole = size / (2 * kVector) * (2 * kVector);
  for (int64_t c = 0; c < whole; c += 2 * kVector)
    for (int half = 0; half < 2; half++) store(to + c + half * kVector, load_half(from + c, half));
  if (whole < size) {
    T rest[2 * kVector] = {};
    std::copy(from + whole, from + size, rest);
    for (int half = 0; half < 2; half++) store(to + whole + half * kVector, load_half(rest, half));
  }
}

template <class T>
void narrow_line(const float* from, float scale, int64_t size, T* to) {
  for (int64_t i = 0; i < size; i += 2 * kVector) {
    float line[2 * kVector];
    for (int v = 0; v < 2 * kVector; v++) line[v] = from[i + (kPaired<T> ? v / 2 + v % 2 * kVector : v)] * scale;
    for (int64_t v = 0; v < 2 * kVector && i + v < size; v += kVector)
      store_some(load(line + v), std::min<int64_t>(kVector, size - i - v), to + i + v);
  }
}

// The products of M queries with R lines of a panel.
template <int M, int R>
void score_tile(const float* queries, const float* panel, int64_t width, float* scores) {
  Floats acc[M][R];
  for (int i = 0; i < M * R; i++) acc[i / R][i % R] = Floats{};
  for (int64_t c = 0; c < width; c += kVector)
    for (int m = 0; m < M; m++) {
      Floats query = load(queries + m * width + c);
      for (int r = 0; r < R; r++) acc[m][r] += query * load(panel + r * width + c);
    }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) scores[m * kSlots + r] = sum(acc[m][r]);
}

// Adds R lines of a panel, weighed, to the values of M queries, `stride` apart.
template <int M, int R>
void value_tile(const float* weights, const float* panel, int64_t width, float* values, int64_t stride) {
  for (int64_t c = 0; c < width; c += 2 * kVector) {
    Floats acc[M][2];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) acc[m][v] = load(values + m * stride + c + v * kVector);
    for (int r = 0; r < R; r++) {
      Floats a = load(panel + r * width + c), b = load(panel + r * width + c + kVector);
      for (int m = 0; m < M; m++) {
        acc[m][0] += a * weights[m * kSlots + r];
        acc[m][1] += b * weights[m * kSlots + r];
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) store(values + m * stride + c + v * kVector, acc[m][v]);
  }
}

// Adds what a query has summed up in a later part.
inline void join(Sums to, Sums from, int64_t query) {
  if (from.weight(query) == 0) return;
  float largest = std::max(to.largest(query), from.largest(query));
  float mine = std::exp(to.largest(query) - largest), its = std::exp(from.largest(query) - largest);
  to.largest(query) = largest;
  to.weight(query) = to.weight(query) * mine + from.weight(query) * its;
  for (int64_t c = 0; c < to.size; c++) to.values(query)[c] = to.values(query)[c] * mine + from.values(query)[c] * its;
}

// Makes scores weights, and what the query has summed up so far relative to the largest score now.
inline void weigh(const Attend& p, uint32_t seen, float* scores, Sums sums, int64_t query) {
  if (!seen) return std::fill(scores, scores + kSlots, 0.0f);
  Words lane;
  for (int i = 0; i < kVector; i++) lane[i] = i;
  Floats most = Floats{} + kNothing;
  for (int64_t s = 0; s < kSlots; s += kVector) {
    Floats x = load(scores + s) * p.scale;
    if (p.softcap > 0) x = tanh_of(x / p.softcap) * p.softcap;
    x = ((Words{} + (seen >> s)) >> lane & 1) == 1 ? x : Floats{} + kNothing;
    store(scores + s, x);
    most = x > most ? x : most;
  }
  float largest = sums.largest(query), before = largest;
  for (int i = 0; i < kVector; i++) largest = std::max(largest, most[i]);
  Floats total = {};
  for (int64_t s = 0; s < kSlots; s += kVector) {
    Floats weights = exp_of(load(scores + s) - largest);
    store(scores + s, weights);
    total += weights;
  }
  sums.largest(query) = largest;
  if (sums.weight(query) == 0 || before == largest) {
    sums.weight(query) += sum(total);
    return;
  }
  float shrink = exp_of(Floats{} + (before - largest))[0];
  sums.weight(query) = sums.weight(query) * shrink + sum(total);
  for (int64_t c = 0; c < sums.size; c += kVector) store(sums.values(query) + c, load(sums.values(query) + c) * shrink);
}

// Calls a function with the numbers of all queries, in tiles.
template <class Function>
void each_tile(int64_t count, Function function) {
  int64_t query = 0;
  for (; query + kQueries <= count; query += kQueries) function(std::integral_constant<int, kQueries>{}, query);
  for (; query < count; query++) function(std::integral_constant<int, 1>{}, query);
}

// Adds up what a group's queries see of the slots first .. last - 1.
template <class T>
void attend_part(const Group& group, int64_t first, int64_t last, const float* queries, Sums sums) {
  const Attend& p = group.p;
  int64_t width = padded(p.size), count = group.queries(), stride = Sums::length(width);
  std::vector<Floats> memory((kLines * width + count * kSlots) / kVector);
  float *panel = reinterpret_cast<float*>(memory.data()), *scores = panel + kLines * width;
  std::vector<uint32_t> seen(p.tokens);
  // Widens the lines slot .. slot + kLines - 1 where anyone sees them, and fetches those that follow.
  auto fill = [&](const void* from, const int64_t* strides, int64_t slot, uint32_t any) {
    const T* line = static_cast<const T*>(from) + group.row * strides[0] + group.kv_head * strides[2];
    line += slot * strides[1];
    for (float* to = panel; to < panel + kLines * width; to += width, line += strides[1], any >>= 1) {
      for (int64_t c = 0; c < p.size; c += kLine / sizeof(T)) __builtin_prefetch(line + kLines * strides[1] + c);
      if (any & 1)
        widen_line(line, p.size, to);
      else
        std::fill(to, to + width, 0.0f);
    }
  };
  for (int64_t slot = first; slot < last; slot += kSlots) {
    uint32_t any = 0;
    for (int64_t t = 0; t < p.tokens; t++) any |= seen[t] = group.sees(t, slot, std::min(kSlots, last - slot));
    if (!any) continue;
    for (int64_t s = 0; s < kSlots; s += kLines) {
      if (!(any >> s & kEvery)) continue;
      fill(p.keys, p.keys_at, slot + s, any >> s);
      each_tile(count, [&](auto m, int64_t q) {
        for (int64_t r = 0; r < kLines; r += 2)
          score_tile<m, 2>(queries + q * width, panel + r * width, width, scores + q * kSlots + s + r);
      });
    }
    for (int64_t q = 0; q < count; q++) weigh(p, seen[group.token(q)], scores + q * kSlots, sums, q);
    for (int64_t s = 0; s < kSlots; s += kLines) {
      if (!(any >> s & kEvery)) continue;
      fill(p.values, p.values_at, slot + s, any >> s);
      each_tile(count, [&](auto m, int64_t q) {
        value_tile<m, kLines>(scores + q * kSlots + s, panel, width, sums.values(q), stride);
      });
    }
  }
}

template <class T>
void attend_of(const Attend& p) {
  int64_t width = padded(p.size), queries = p.heads / p.kv_heads * p.tokens, most = 0;
  for (int64_t row = 0; row < p.rows; row++) most = std::max(most, p.held[row]);
  int64_t slots = std::min(p.slots, most + p.after), parts = std::max<int64_t>(1, (slots + kPart - 1) / kPart);
  int64_t groups = p.rows * p.kv_heads, length = queries * Sums::length(width);
  std::vector<float> all(groups * parts * length);
  auto sums_of = [&](int64_t group, int64_t part) { return Sums{width, all.data() + (group * parts + part) * length}; };
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> widened(queries * width);
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < groups * parts; piece++) {
      int64_t part = piece / groups, g = piece % groups;
      Group group{p, g / p.kv_heads, g % p.kv_heads};
      Sums sums = sums_of(g, part);
      for (int64_t q = 0; q < queries; q++) {
        sums.largest(q) = kNothing;
        widen_line(static_cast<const T*>(p.query) + group.row * p.query_at[0] + group.head(q) * p.query_at[1] +
                       group.token(q) * p.query_at[2],
                   p.size, widened.data() + q * width);
      }
      int64_t first = part * kPart;
      attend_part<T>(group, first, std::min(first + kPart, slots), widened.data(), sums);
    }
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      Group group{p, g / p.kv_heads, g % p.kv_heads};
      for (int64_t q = 0; q < queries; q++) {
        Sums sums = sums_of(g, 0);
        for (int64_t part = 1; part < parts; part++) join(sums, sums_of(g, part), q);
        T* y = static_cast<T*>(p.y) + ((group.row * p.tokens + group.token(q)) * p.heads + group.head(q)) * p.size;
        float weight = sums.weight(q);
        narrow_line(sums.values(q), weight != 0 ? 1 / weight : 0, p.size, y);
      }
    }
  }
}

}  // namespace

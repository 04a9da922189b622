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

// Which of the slots first .. first + count - 1 a token of a row sees, a bit for each.
inline uint32_t seen_bits(const Attend& p, int64_t row, int64_t token, int64_t first, int64_t count) {
  const uint8_t* seen = p.seen + (row * p.tokens + token) * p.after;
  int64_t after = first - p.held[row], held = std::clamp<int64_t>(-after, 0, count);
  uint32_t bits = uint32_t((uint64_t(1) << held) - 1);
  for (int64_t s = held; s < std::min(count, p.after - after); s++) bits |= uint32_t(seen[after + s] != 0) << s;
  return bits;
}

// The slots that a token sees after those that its row holds, counted from there, where they are not the first ones: a
// branch of a tree. They are added up as if they were, so that a branch gets the same bits as a chain.
inline std::vector<int64_t> slots_apart(const Attend& p, int64_t row, int64_t token) {
  const uint8_t* seen = p.seen + (row * p.tokens + token) * p.after;
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < std::min(p.after, p.slots - p.held[row]); i++)
    if (seen[i]) slots.push_back(i);
  if (slots.empty() || slots.back() == int64_t(slots.size()) - 1) slots.clear();
  return slots;
}

// What the queries of a head of keys and values have summed up over some slots: the sum of weights, 0 before the first
// slot, and the weighed values, both relative to the largest score. A query is one head of one token, tokens first.
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

// The products of M queries with R lines, `stride` apart: widened ones, or some of T that are a whole number of steps.
template <int M, int R, class T>
void score_tile(const float* queries, const T* lines, int64_t stride, int64_t width, float* scores) {
  Floats acc[M][R];
  for (int i = 0; i < M * R; i++) acc[i / R][i % R] = Floats{};
  for (int64_t c = 0; c < width; c += 2 * kVector)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      Floats line[R];
      for (int r = 0; r < R; r++) line[r] = load_half(lines + r * stride + c, half);
      for (int m = 0; m < M; m++) {
        Floats query = load(queries + m * width + c + half * kVector);
        for (int r = 0; r < R; r++) acc[m][r] += query * line[r];
      }
    }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) scores[m * kSlots + r] = sum(acc[m][r]);
}

// Adds such lines, weighed, to the values of M queries, `length` apart.
template <int M, int R, class T>
void value_tile(const float* weights, const T* lines, int64_t stride, int64_t width, float* values, int64_t length) {
  for (int64_t c = 0; c < width; c += 2 * kVector) {
    Floats acc[M][2];
    for (int m = 0; m < M; m++)
      for (int half = 0; half < 2; half++) acc[m][half] = load(values + m * length + c + half * kVector);
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        Floats line = load_half(lines + r * stride + c, half);
        for (int m = 0; m < M; m++) acc[m][half] += line * weights[m * kSlots + r];
      }
    for (int m = 0; m < M; m++)
      for (int half = 0; half < 2; half++) store(values + m * length + c + half * kVector, acc[m][half]);
  }
}

// Adds what a query has summed up in a later part.
inline void join(Sums to, Sums from, int64_t query) {
  if (from.weight(query) == 0) return;
  if (to.weight(query) == 0) to.largest(query) = kNothing;
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
  float largest = sums.weight(query) == 0 ? kNothing : sums.largest(query), before = largest;
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

// Some neighbouring heads of keys or values in a row.
template <class T>
struct Heads {
  const T* at;
  int64_t slot, head, count;  // strides of a slot and a head, and how many heads

  // Fetches the `part`th kLines lines of a block of slots, counted as they lie, all heads of a slot together. GCC drops
  // calls of a function that only fetches, unless they are put inline at once.
  [[gnu::always_inline]] void fetch(int64_t first, int64_t part, int64_t size) const {
    for (int64_t i = part * kLines; i < (part + 1) * kLines; i++)
      for (int64_t c = 0; c < size; c += kLine / sizeof(T))
        __builtin_prefetch(at + (first + i / count) * slot + i % count * head + c);
  }
};

// What a piece of work is: some heads of a row, over some slots.
struct Piece {
  int64_t row, head, heads, first, last;
};

// A piece at work: its queries, widened, and room for lines and scores.
template <class T>
struct Worker {
  const Attend& p;
  const Piece& piece;
  int64_t width, count;  // of a widened line, and the queries of a head of keys and values
  std::vector<Floats> memory;
  float *panel, *scores, *queries;
  std::vector<uint32_t> seen;
  std::vector<std::vector<int64_t>> apart;  // of each token, see slots_apart
  Heads<T> keys, values;

  Worker(const Attend& p, const Piece& piece)
      : p(p), piece(piece), width(padded(p.size)), count(p.heads / p.kv_heads * p.tokens),
        memory((kLines * width + count * kSlots + piece.heads * count * width) / kVector),
        panel(reinterpret_cast<float*>(memory.data())), scores(panel + kLines * width),
        queries(scores + count * kSlots), seen(p.tokens), keys(heads_of(p.keys, p.keys_at)),
        values(heads_of(p.values, p.values_at)) {
    for (int64_t t = 0; t < p.tokens; t++) apart.push_back(slots_apart(p, piece.row, t));
    for (int64_t i = 0; i < piece.heads * count; i++) {
      int64_t head = (piece.head + i / count) * shared() + i % shared(), token = i % count / shared();
      widen_line(static_cast<const T*>(p.query) + piece.row * p.query_at[0] + head * p.query_at[1] +
                     token * p.query_at[2],
                 p.size, queries + i * width);
    }
  }

  int64_t shared() const { return p.heads / p.kv_heads; }

  Heads<T> heads_of(const void* from, const int64_t* strides) const {
    const T* at = static_cast<const T*>(from) + piece.row * strides[0] + piece.head * strides[2];
    return {at, strides[1], strides[2], piece.heads};
  }

  // Calls a function with kLines lines of a head after the other, and how far they are apart: as they lie where one
  // tile takes them all, else widened to the panel, zeros where nobody sees them.
  template <class Function>
  void each_lines(const Heads<T>& from, int64_t slot, int64_t head, uint32_t any, Function function) {
    for (int64_t s = 0; s < kSlots; s += kLines, any >>= kLines) {
      from.fetch(slot + kSlots, (head * kSlots + s) / kLines, p.size);
      const T* lines = from.at + (slot + s) * from.slot + head * from.head;
      if (!(any & kEvery)) continue;
      if (count <= kQueries && width == p.size && (any & kEvery) == kEvery) {
        function(s, lines, from.slot);
        continue;
      }
      for (int64_t r = 0; r < kLines; r++) {
        if (any >> r & 1)
          widen_line(lines + r * from.slot, p.size, panel + r * width);
        else
          std::fill(panel + r * width, panel + (r + 1) * width, 0.0f);
      }
      function(s, static_cast<const float*>(panel), width);
    }
  }

  // Adds up what the queries of one head see of kSlots slots.
  void add(int64_t slot, int64_t head, uint32_t any, Sums sums) {
    each_lines(keys, slot, head, any, [&](int64_t s, auto* lines, int64_t stride) {
      each_tile(count, [&](auto m, int64_t q) {
        const float* query = queries + (head * count + q) * width;
        for (int64_t r = 0; r < kLines; r += 2)
          score_tile<m, 2>(query, lines + r * stride, stride, width, scores + q * kSlots + s + r);
      });
    });
    for (int64_t q = 0; q < count; q++) weigh(p, seen[q / shared()], scores + q * kSlots, sums, q);
    each_lines(values, slot, head, any, [&](int64_t s, auto* lines, int64_t stride) {
      each_tile(count, [&](auto m, int64_t q) {
        value_tile<m, kLines>(scores + q * kSlots + s, lines, stride, width, sums.values(q), Sums::length(width));
      });
    });
  }

  // Calls a function with kLines lines after the other of those that a token sees apart, widened, zeros after the last.
  template <class Function>
  void each_apart(const Heads<T>& from, int64_t slot, int64_t head, int64_t token, int64_t end, Function function) {
    int64_t held = p.held[piece.row];
    for (int64_t s = 0; s < kSlots && slot + s < end; s += kLines) {
      for (int64_t r = 0; r < kLines; r++) {
        int64_t at = slot + s + r;
        if (at >= held && at < end) at = held + apart[token][at - held];
        if (slot + s + r < end)
          widen_line(from.at + at * from.slot + head * from.head, p.size, panel + r * width);
        else
          std::fill(panel + r * width, panel + (r + 1) * width, 0.0f);
      }
      function(s);
    }
  }

  // Adds up what a token sees of kSlots slots, those after the held ones counted as it sees them.
  void add_apart(int64_t slot, int64_t head, int64_t token, Sums sums) {
    int64_t end = p.held[piece.row] + apart[token].size(), first = token * shared();
    if (slot >= end) return;
    each_apart(keys, slot, head, token, end, [&](int64_t s) {
      for (int64_t q = first; q < first + shared(); q++)
        for (int64_t r = 0; r < kLines; r += 2)
          score_tile<1, 2>(queries + (head * count + q) * width, panel + r * width, width, width,
                           scores + q * kSlots + s + r);
    });
    uint32_t bits = uint32_t((uint64_t(1) << std::min(kSlots, end - slot)) - 1);
    for (int64_t q = first; q < first + shared(); q++) weigh(p, bits, scores + q * kSlots, sums, q);
    each_apart(values, slot, head, token, end, [&](int64_t s) {
      for (int64_t q = first; q < first + shared(); q++)
        value_tile<1, kLines>(scores + q * kSlots + s, panel, width, width, sums.values(q), Sums::length(width));
    });
  }

  // Adds up what the queries see of all slots of the piece; `sums_of` gives a head its sums.
  template <class Function>
  void add_all(Function sums_of) {
    for (int64_t slot = piece.first; slot < piece.last; slot += kSlots) {
      bool held = slot + kSlots <= p.held[piece.row];
      uint32_t any = 0;
      for (int64_t t = 0; t < p.tokens; t++) {
        bool straight = held || apart[t].empty();
        any |= seen[t] = straight ? seen_bits(p, piece.row, t, slot, std::min(kSlots, piece.last - slot)) : 0;
      }
      for (int64_t head = 0; any && head < piece.heads; head++) add(slot, head, any, sums_of(piece.head + head));
      for (int64_t t = 0; !held && t < p.tokens; t++)
        for (int64_t head = 0; !apart[t].empty() && head < piece.heads; head++)
          add_apart(slot, head, t, sums_of(piece.head + head));
    }
  }
};

template <class T>
void attend_of(const Attend& p) {
  int64_t width = padded(p.size), queries = p.heads / p.kv_heads * p.tokens, most = 0;
  for (int64_t row = 0; row < p.rows; row++) most = std::max(most, p.held[row]);
  int64_t slots = std::min(p.slots, most + p.after), parts = std::max<int64_t>(1, (slots + kPart - 1) / kPart);
  int64_t length = queries * Sums::length(width), pieces = p.rows * parts;
  int64_t splits = std::clamp<int64_t>(2 * p.threads / std::max<int64_t>(pieces, 1), 1, p.kv_heads);  // of the heads
  std::vector<float> all(pieces * p.kv_heads * length);
  auto sums_of = [&](int64_t row, int64_t part, int64_t head) {
    return Sums{width, all.data() + ((row * parts + part) * p.kv_heads + head) * length};
  };
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < pieces * splits; i++) {
      int64_t row = i / splits / parts, part = i / splits % parts, head = i % splits * p.kv_heads / splits;
      int64_t end = (i % splits + 1) * p.kv_heads / splits;
      Piece piece{row, head, end - head, part * kPart, std::min((part + 1) * kPart, slots)};
      Worker<T>(p, piece).add_all([&](int64_t h) { return sums_of(row, part, h); });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows * p.kv_heads * queries; i++) {
      int64_t row = i / queries / p.kv_heads, head = i / queries % p.kv_heads, query = i % queries;
      Sums sums = sums_of(row, 0, head);
      for (int64_t part = 1; part < parts; part++) join(sums, sums_of(row, part, head), query);
      int64_t shared = p.heads / p.kv_heads, token = query / shared;
      T* y = static_cast<T*>(p.y) + ((row * p.tokens + token) * p.heads + head * shared + query % shared) * p.size;
      float weight = sums.weight(query);
      narrow_line(sums.values(query), weight != 0 ? 1 / weight : 0, p.size, y);
    }
  }
}

}  // namespace

// Sums of rows of a weight, weighed by tokens.

#pragma once

#include <memory>
#include <vector>

#include "readers.h"
#include "rows.h"

namespace {

constexpr int64_t kChunk = 128;                // most rows that are added up before their sum joins the others'
constexpr int64_t kDeep = 16, kColumns = 192;  // rows x columns of a panel, where they meet a batch in the cache

// Rows are added one by one, or in pairs by dot products.
template <class T, bool alone = false>
using SumRow = std::conditional_t<kDots<T>, Stacked<alone>, Widened<T>>;

template <class T>
constexpr int kTaken = SumRow<T>::kRows;  // rows at once

template <class T>
constexpr int64_t reads(int64_t rows) {
  return (rows + kTaken<T> - 1) / kTaken<T>;
}

// What project adds up: rows are cut into chunks whose sums are added in turn, always the same ones, so that threads
// can share them. Only the last one may have an odd number of rows: no pair is cut.
struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t rows) : rows(rows), count((rows + kChunk - 1) / kChunk) {}
  int64_t begin(int64_t chunk) const { return std::min(rows, chunk * ((rows + 1) / 2) / count * 2); }
};

// The order in which rows are added: in a chunk from kFewRows places in turn, so that they are read in as many long
// runs side by side, as a run's end costs.
inline std::vector<int64_t> order_of(const Chunks& chunks) {
  std::vector<int64_t> order(chunks.rows);
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    int64_t begin = chunks.begin(chunk), end = chunks.begin(chunk + 1), run = (end - begin) / kFewRows, place = begin;
    for (int64_t i = begin; i < begin + run; i++)
      for (int r = 0; r < kFewRows; r++) order[place++] = i + r * run;
    for (; place < end; place++) order[place] = place;
  }
  return order;
}

// The place, in that order, of row i of `run` * kFewRows rows that are neighbours in memory.
inline int64_t place_of(int64_t i, int64_t run) { return i % run * kFewRows + i / run; }

// Sets the weight of the row at a place, which begins as zero.
template <class T>
void set_weight(typename SumRow<T>::Element* weights, int64_t place, T weight) {
  if constexpr (kDots<T>)
    weights[place / 2] |= uint32_t(weight.bits) << place % 2 * 16;
  else
    weights[place] = widen(weight);
}

// What is added up, in that order.
template <class T>
struct Terms {
  Chunks chunks;
  int64_t stride;                                    // of a token's weights
  std::vector<int64_t> order, rows;                  // [count], the place of each term among z, and its row
  std::vector<typename SumRow<T>::Element> weights;  // [tokens, stride], widened or in pairs

  explicit Terms(const Project& p)
      : chunks(p.count), stride(reads<T>(p.count)), order(order_of(chunks)), rows(order) {
    if (p.index)
      for (int64_t& row : rows) row = p.index[row];
  }

  Rows<T> of(const Project& p) const { return {static_cast<const T*>(p.w), p.stride, p.count, rows.data()}; }
};

// Writes a token's sums of some columns; bfloat16 has them in the paired order of formats.h, and here they leave it.
template <class T, class Product>
void write_sums(const Product& p, int64_t token, int64_t column, int64_t width, const float* sums) {
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + token * p.width + column;
  auto write = [&](int64_t c, float sum) { narrow(sum + (bias ? widen(bias[column + c]) : 0), y + c); };
  int64_t c = 0;
  if constexpr (kPaired<T>)
    for (; c + kStep<T> <= width; c += kStep<T>)
      for (int64_t i = 0; i < kStep<T>; i++)
        write(c + i, sums[c + i / (2 * kVector) * (2 * kVector) + i % (2 * kVector) / 2 + i % 2 * kVector]);
  for (; c < width; c++) write(c, sums[c]);
}

// Adds what N readers give, weighed by z[0 .. N), to the sums of one token.
template <int N, class Row>
void add_rows(const Row* row, const Row* next, const typename Row::Element* z, float* sums, int64_t width) {
  constexpr int64_t step = kStep<typename Row::Format>;
  auto add = [&](int64_t c, auto&& loaded) {
    Floats s = load(sums + c);
    for (int r = 0; r < N; r++) s = multiply_add(s, loaded(row[r]), z[r]);
    store(sums + c, s);
  };
  auto add_two = [&](int64_t c) {
    Floats s = load(sums + c), t = load(sums + c + kVector);
    for (int r = 0; r < N; r++) {
      s = multiply_add(s, row[r].half(c, 0), z[r]);
      t = multiply_add(t, row[r].half(c, 1), z[r]);
    }
    store(sums + c, s);
    store(sums + c + kVector, t);
  };
  for (int r = 0; r < N; r++) next[r].fetch();
  int64_t c = 0;
  for (; c + step <= width; c += step) {
    for (int r = 0; r < N; r++) row[r].fetch(next[r], c, width);
#pragma GCC unroll 8
    for (int64_t v = c; v < c + step; v += 2 * kVector) add_two(v);
  }
  for (; c + kVector <= width; c += kVector) add(c, [&](const Row& from) { return from.whole(c); });
  if (c < width) add(c, [&](const Row& from) { return from.part(c, width - c); });
}

// Adds rows i .. end - 1 in whole blocks of R, and returns the first that is left.
template <class T, int R>
int64_t add_blocks(const Rows<T>& rows, int64_t i, int64_t end, int64_t column, const typename SumRow<T>::Element* z,
                   float* sums, int64_t width) {
  using Row = SumRow<T, R == 1>;
  constexpr int N = reads<T>(R);
  for (; i + R <= end; i += R) {
    Row row[N], next[N];
    for (int r = 0; r < N; r++) {
      row[r] = Row::at(rows, i + r * kTaken<T>, column);
      next[r] = Row::at(rows, i + R + r * kTaken<T>, column);
    }
    add_rows<N>(row, next, z + i / kTaken<T>, sums, width);
  }
  return i;
}

// Adds up some columns of a chunk's rows.
template <class T>
void add_chunk(const Rows<T>& rows, const Chunks& chunks, int64_t chunk, int64_t column, int64_t width,
               const typename SumRow<T>::Element* z, float* sums) {
  int64_t last = chunks.begin(chunk + 1);
  int64_t i = add_blocks<T, kFewRows>(rows, chunks.begin(chunk), last, column, z, sums, width);
  i = add_blocks<T, 2>(rows, i, last, column, z, sums, width);
  add_blocks<T, 1>(rows, i, last, column, z, sums, width);
}

// Adds up what the chunks of a token come to, [chunks, stride], and writes it. Called by all threads.
template <class T, class Product>
void join_chunks(const Product& p, int64_t token, const Chunks& chunks, const float* sums, int64_t stride) {
#pragma omp for schedule(static) nowait
  for (int64_t column = 0; column < p.width; column += kLine) {
    float totals[kLine] = {};
    for (int64_t chunk = 0; chunk < chunks.count; chunk++)
      for (int64_t c = 0; c < kLine; c++) totals[c] += sums[chunk * stride + column + c];
    write_sums<T>(p, token, column, std::min<int64_t>(kLine, p.width - column), totals);
  }
}

// One token: threads share the columns of all chunks, chunk by chunk, so that most rows are read whole.
template <class T>
void project_one(const Project& p, const Terms<T>& terms) {
  const Chunks& chunks = terms.chunks;
  Rows<T> rows = terms.of(p);
  int64_t pieces = (p.width + kLine - 1) / kLine, stride = pieces * kLine, taken;
  std::unique_ptr<float[]> sums(new float[chunks.count * stride]);
#pragma omp parallel num_threads(p.threads) private(taken)
  {
    Share share(chunks.count * pieces);
    for (int64_t at = share.begin; at < share.end; at += taken) {
      int64_t chunk = at / pieces, column = at % pieces * kLine;
      taken = std::min(pieces - at % pieces, share.end - at);
      float* to = sums.get() + chunk * stride + column;
      std::fill(to, to + taken * kLine, 0.0f);
      add_chunk(rows, chunks, chunk, column, std::min(taken * kLine, p.width - column), terms.weights.data(), to);
    }
#pragma omp barrier
    join_chunks<T>(p, 0, chunks, sums.get(), stride);
  }
}

// Adds `count` rows of a panel [count, kColumns], weighed by z, to `width` sums of M tokens.
template <int M>
void add_panel(const float* panel, int64_t width, int64_t count, const float* z, int64_t stride, float* sums) {
  for (int64_t c = 0; c < width; c += kTile * kVector) {
    Floats acc[M][kTile];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kTile; v++) acc[m][v] = load(sums + m * kColumns + c + v * kVector);
    int64_t r = 0;
    do {  // there is a row; a loop that may not run at all keeps the sums twice
      Floats a[kTile];
      for (int v = 0; v < kTile; v++) a[v] = load(panel + r * kColumns + c + v * kVector);
      for (int m = 0; m < M; m++)
        for (int v = 0; v < kTile; v++) acc[m][v] = multiply_add(acc[m][v], a[v], z[m * stride + r]);
    } while (++r < count);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kTile; v++) store(sums + m * kColumns + c + v * kVector, acc[m][v]);
  }
}

// Fetches the columns from `begin` to `end` of one row after the other, some lines at a time; of as many rows as a
// panel has first those that are neighbours in memory.
template <class T>
struct Ahead {
  const Rows<T>& rows;
  int64_t begin, end, next = kDeep;  // the row to fetch next
  const T *line = nullptr, *stop = nullptr;

  Ahead(const Rows<T>& rows, int64_t begin, int64_t end) : rows(rows), begin(begin), end(end) {
    if (rows.count) turn();
  }

  void turn() {
    int64_t within = next % kDeep, run = kDeep / kFewRows;
    const T* row = rows[next - within + place_of(within, run)];
    line = row + begin, stop = row + end, next++;
  }

  [[gnu::always_inline]] void fetch(int64_t lines) {
    for (; lines > 0; lines--) {
      __builtin_prefetch(line);
      line += kLine / sizeof(T);
      if (line >= stop) turn();
    }
  }
};

// The sums of some tokens, of the columns from `begin` to `end`, where rows are widened. Some rows at a time, panel by
// panel of their columns, while the next rows are fetched one after the other: memory is faster in long runs.
template <class T>
void project_columns(const Project& p, const Terms<T>& terms, int64_t token, int64_t tokens, int64_t begin,
                     int64_t end) {
  alignas(kLine) float panel[kDeep * kColumns] = {};
  int64_t blocks = (end - begin + kColumns - 1) / kColumns, size = tokens * kColumns;
  std::vector<float> sums(blocks * size), totals(blocks * size);
  const Chunks& chunks = terms.chunks;
  const float* z = terms.weights.data() + token * terms.stride;
  Rows<T> rows = terms.of(p);
  Ahead<T> ahead(rows, begin, end);
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t i = chunks.begin(chunk), last = chunks.begin(chunk + 1), count; i < last; i += count) {
      count = std::min(kDeep, last - i);
      for (int64_t block = 0; block < blocks; block++) {
        int64_t column = begin + block * kColumns, width = std::min(kColumns, end - column);
        int64_t lines = count * width * int64_t(sizeof(T)) / kLine;
        for (int64_t r = 0; r < count; r++) unpack(Widened<T>::at(rows, i + r, column), width, panel + r * kColumns);
        for (int64_t m = 0; m < tokens; m += kTileTokens) {
          ahead.fetch(std::min(m + kTileTokens, tokens) * lines / tokens - m * lines / tokens);
          for_tokens(tokens - m, [&](auto M) __attribute__((always_inline)) {
            add_panel<M>(panel, width, count, z + m * terms.stride + i, terms.stride,
                         sums.data() + block * size + m * kColumns);
          });
        }
      }
    }
    for (int64_t i = 0; i < blocks * size; i++) totals[i] += sums[i];
  }
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t m = 0; m < tokens; m++) {
      int64_t column = begin + block * kColumns;
      write_sums<T>(p, token + m, column, std::min(kColumns, end - column),
                    totals.data() + block * size + m * kColumns);
    }
}

template <class T>
Terms<T> terms_of(const Project& p) {
  Terms<T> terms(p);
  terms.weights.resize(p.rows * terms.stride);
  for (int64_t m = 0; m < p.rows; m++)
    for (int64_t place = 0; place < p.count; place++) {
      T from = static_cast<const T*>(p.z)[m * p.count + terms.order[place]];
      set_weight(terms.weights.data() + m * terms.stride, place, from);
    }
  return terms;
}

}  // namespace

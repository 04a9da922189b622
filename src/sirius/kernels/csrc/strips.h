// Sums of rows of a weight, weighed by several tokens, where pairs of rows are multiplied as they are.
//
// Memory bounds such sums. So some rows at a time are added up in strips of their columns, strip by strip. Meanwhile the
// rows that follow are fetched evenly, in the order of memory. The sums of a strip stay in registers.
//
// `project_of`, which chooses among all ways to project, is at the end.

#pragma once

#include <vector>

#include "amx_project.h"
#include "project.h"

namespace {

constexpr int kStripTokens = 8, kStripVectors = 2;  // tokens and vectors of columns whose sums stay in registers
constexpr int64_t kStripRows = 64, kStripColumns = kStripVectors * kVector;
static_assert(!kPairs || kStripColumns % kStep<BFloat16> == 0, "a strip is whole steps, so the paired order covers it");
static_assert(kBatch <= 2 * kStripTokens, "a batch is two groups of tokens at most, which share the fetching");

// Pairs of rows as they are multiplied, in the paired order of formats.h.
using Strip = uint32_t[kStripRows / 2][kStripColumns];

// Fetches some lines of rows that follow, neighbours in memory one after the other.
struct Following {
  const BFloat16* rows[kStripRows];
  int64_t count, lines, row = 0, line = 0;

  // Of the rows at places first .. end - 1, `lines` from a column on.
  Following(const Rows<BFloat16>& from, int64_t first, int64_t end, int64_t column, int64_t lines)
      : count(lines ? end - first : 0), lines(lines) {
    int64_t run = count / kFewRows;
    for (int64_t i = 0; i < count; i++)
      rows[i] = from[first + (i < run * kFewRows ? place_of(i, run) : i)] + column;
  }

  [[gnu::always_inline]] void fetch() {
    if (row == count) return;
    __builtin_prefetch(rows[row] + line * int64_t(kLine / sizeof(BFloat16)));
    if (++line == lines) line = 0, row++;
  }
};

// Adds pairs of a strip, weighed by z [pairs, tokens], to the sums of M tokens, `stride` apart. Fetches a line for each.
template <int M>
void add_strip(const Strip& strip, int64_t pairs, const uint32_t* z, int64_t tokens, float* sums, int64_t stride,
               Following& following) {
  Floats acc[M][kStripVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kStripVectors; v++) acc[m][v] = load(sums + m * stride + v * kVector);
  int64_t r = 0;
  do {  // there is a pair; a loop that may not run at all keeps the sums twice
    following.fetch();
    Words a[kStripVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kStripVectors; v++) a[v] = stored<Words>(strip[r] + v * kVector);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < kStripVectors; v++) acc[m][v] = multiply_add(acc[m][v], a[v], z[r * tokens + m]);
  } while (++r < pairs);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kStripVectors; v++) store(sums + m * stride + v * kVector, acc[m][v]);
}

// Some tokens' sums of the columns from `begin` to `end`.
struct Strips {
  const Project& p;
  const Terms<BFloat16>& terms;
  int64_t token, tokens, begin, end;
  Rows<BFloat16> rows = terms.of(p);
  const Chunks& chunks = terms.chunks;
  int64_t stride = (end - begin + kStripColumns - 1) / kStripColumns * kStripColumns;  // of a token's sums
  int64_t groups = (tokens + kStripTokens - 1) / kStripTokens, group = (tokens + groups - 1) / groups;
  std::vector<float> sums = std::vector<float>(tokens * stride), totals = sums;
  std::vector<uint32_t> z = std::vector<uint32_t>(kChunk / 2 * tokens);
  alignas(kLine) Strip strip = {};

  // Sets z to the weights of a chunk's pairs, [pairs, tokens].
  void gather(int64_t first, int64_t last) {
    std::fill(z.begin(), z.end(), 0);
    for (int64_t m = 0; m < tokens; m++) {
      const BFloat16* from = static_cast<const BFloat16*>(p.z) + (token + m) * p.count;
      for (int64_t i = first; i < last; i++)
        z[(i - first) / 2 * tokens + m] |= uint32_t(from[terms.order[i]].bits) << (i - first) % 2 * 16;
    }
  }

  // Writes some columns of rows i .. last - 1 to the strip. If tokens are one group, half of the lines are fetched here.
  void fill(int64_t i, int64_t last, int64_t column, Following& following) {
    int64_t width = std::min(kStripColumns, end - column), pair = 0;
    for (; i + 2 <= last; i += 2) {
      if (groups == 1) following.fetch();
      unpack(Stacked<false>::at(rows, i, column), width, strip[pair++]);
    }
    if (i < last) unpack(Stacked<true>::at(rows, i, column), width, strip[pair]);
  }

  // Adds rows first .. last - 1, weighed by `weights` [pairs, tokens], and fetches rows last .. next - 1.
  void add(int64_t first, int64_t last, const uint32_t* weights, int64_t next) {
    Following following(rows, last, next, begin, (end - begin) * int64_t(sizeof(BFloat16)) / kLine);
    for (int64_t column = begin; column < end; column += kStripColumns) {
      fill(first, last, column, following);
      for (int64_t m = 0; m < tokens; m += group)
        for_tokens<kStripTokens>(std::min(group, tokens - m), [&](auto M) __attribute__((always_inline)) {
          float* to = sums.data() + m * stride + column - begin;
          add_strip<M>(strip, reads<BFloat16>(last - first), weights + m, tokens, to, stride, following);
        });
    }
  }

  void run() {
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      int64_t first = chunks.begin(chunk), last = chunks.begin(chunk + 1);
      gather(first, last);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t i = first, stop; i < last; i = stop) {
        stop = std::min(i + kStripRows, last);
        int64_t next = stop < last ? last : chunk + 1 < chunks.count ? chunks.begin(chunk + 2) : stop;
        add(i, stop, z.data() + (i - first) / 2 * tokens, std::min(next, stop + kStripRows));
      }
      for (size_t i = 0; i < totals.size(); i++) totals[i] += sums[i];
    }
    for (int64_t m = 0; m < tokens; m++)
      write_sums<BFloat16>(p, token + m, begin, end - begin, totals.data() + m * stride);
  }
};

// The table in rows.h says which way runs when.
template <class T>
void project_of(const Project& p) {
  if constexpr (kTiles<T>) return amx_project(p);
  if (p.rows == 1) return project_one<T>(p, terms_of<T>(p));
  auto terms = kDots<T> ? Terms<T>(p) : terms_of<T>(p);
#pragma omp parallel num_threads(p.threads)
  {
    Share share((p.width + kLine - 1) / kLine);
    int64_t begin = share.begin * kLine, end = std::min(share.end * kLine, p.width);
    for (int64_t m = 0; begin < end && m < p.rows; m += kBatch) {
      int64_t tokens = std::min(kBatch, p.rows - m);
      if constexpr (kDots<T>)
        Strips{p, terms, m, tokens, begin, end}.run();
      else
        project_columns<T>(p, terms, m, tokens, begin, end);
    }
  }
}

}  // namespace

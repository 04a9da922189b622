// Gated MLPs of rows of a batch that each have neurons of their own, bit for bit what a row alone comes to: its
// products and sums are those of linear.h and project.h, in their order. The rows go through the weights side by side,
// from the first neuron to the last, so that what several of them need is read from memory once.

#pragma once

#include <memory>
#include <vector>

#include "amx_each.h"
#include "linear.h"
#include "pointwise.h"
#include "project.h"

namespace {

constexpr int kRun = 2 * kFewRows;  // neurons of a row at a time
constexpr int64_t kReach = 64;      // neurons that are fetched ahead

// Fetches rows of a weight that some token needs, before it does.
template <class T>
struct Upcoming {
  const Rows<T>& rows;
  int64_t next = -1, reach = 0;  // the first row that is not fetched yet, the last neuron that was read
  const T* row[kRun];            // to be fetched now
  int count = 0;

  // Sets out to fetch what follows a run of neurons.
  void follow(int64_t first, int64_t last) {
    if (next < 0) next = std::lower_bound(rows.index, rows.index + rows.count, first) - rows.index;
    reach = std::max(reach, last);
    for (count = 0; count < kRun && next < rows.count && rows.index[next] < reach + kReach; next++)
      row[count++] = rows[next];
  }

  [[gnu::always_inline]] void operator()(int64_t h) const {
    for (int i = 0; i < count; i++)
      for (int64_t c = h; c < h + kStep<T>; c += kLine / sizeof(T)) __builtin_prefetch(row[i] + c, 0, 2);
  }
};

// The products of M tokens, from `token` on, with a run of neurons.
template <class T, int M>
void dot_run(const Linear& p, const typename DotRow<T>::Element* x, int64_t stride, int64_t token, int64_t first,
             Upcoming<T>& upcoming) {
  constexpr int R = M == 1 ? kRun : kFewRows;
  Rows<T> rows{static_cast<const T*>(p.w), p.stride, p.count, p.index};
  for (int64_t i = first; i < std::min(first + kRun, p.count); i += R) {
    Floats sums[M][R];
    dot_rows<R, M>(x + token * stride, stride, rows_from<T, R>(rows, i).data(), p.width, sums, upcoming);
    write_dots<T, R, M>(p, token, i, 1, p.count, sums);
    upcoming.count = 0;
  }
}

// What the steps of a call share.
template <class T>
struct Sets {
  const Each& p;
  std::vector<int64_t> begin;   // of each row's part of the index, and the end
  std::vector<int64_t> needed;  // the neurons that some row has
  int64_t width;                // of a token's x, padded
  std::vector<typename DotRow<T>::Vector> x;

  explicit Sets(const Each& p) : p(p), begin(p.rows + 1), width((p.width + kLine - 1) / kLine * kLine) {
    for (int64_t b = 0; b < p.rows; b++) begin[b + 1] = begin[b] + p.counts[b];
    std::vector<uint8_t> has(p.height);
    for (int64_t i = 0; i < begin[p.rows]; i++) has[p.index[i]] = 1;
    for (int64_t i = 0; i < p.height; i++)
      if (has[i]) needed.push_back(i);
    x = unpack_tokens<T>(Linear{p.dtype, p.x, p.rows * p.tokens, p.width}, width);
  }

  // y: of each row one after the other, its tokens' products with its neurons
  void linear(const void* w, int64_t stride, const void* bias, T* y) const {
    Rows<T> all{static_cast<const T*>(w), stride, int64_t(needed.size()), needed.data()};
#pragma omp parallel num_threads(p.threads)
    {
      std::vector<int64_t> next, end;
      for (int64_t b = 0; b < p.rows; b++) {
        Share share((p.counts[b] + kRun - 1) / kRun);
        next.push_back(share.begin), end.push_back(share.end);
      }
      Upcoming<T> upcoming{all};
      auto first = [&](int64_t b, int64_t run) { return p.index[begin[b] + run * kRun]; };
      go_side_by_side(next, end, first, [&](int64_t b, int64_t run) {
        const auto* from = reinterpret_cast<const typename DotRow<T>::Element*>(x.data()) + b * p.tokens * width;
        Linear of{p.dtype, nullptr, p.tokens, p.width, w, stride, p.counts[b], p.index + begin[b], bias,
                  y + begin[b] * p.tokens, 1};
        upcoming.follow(first(b, run), of.index[std::min((run + 1) * kRun, of.count) - 1]);
        for (int64_t m = 0; m < p.tokens; m += kTileTokens) switch (p.tokens - m) {  // by for_tokens 4% longer
            case 1: dot_run<T, 1>(of, from, width, m, run * kRun, upcoming); break;
            case 2: dot_run<T, 2>(of, from, width, m, run * kRun, upcoming); break;
            case 3: dot_run<T, 3>(of, from, width, m, run * kRun, upcoming); break;
            default: dot_run<T, kTileTokens>(of, from, width, m, run * kRun, upcoming);
          }
      });
    }
  }

  void project(const T* z) const {
    std::vector<Project> of(p.rows);
    std::vector<Terms<T>> terms(p.rows, Terms<T>(Project{}));
#pragma omp parallel for num_threads(p.threads)
    for (int64_t b = 0; b < p.rows; b++) {
      of[b] = {p.dtype, z + begin[b] * p.tokens, p.tokens, p.counts[b], p.index + begin[b], p.down, p.down_stride,
               p.width, p.bias, static_cast<T*>(p.y) + b * p.tokens * p.width, 1};
      terms[b] = terms_of<T>(of[b]);
    }
#pragma omp parallel num_threads(p.threads)
    {
      Share share((p.width + kLine - 1) / kLine);  // of the columns
      int64_t column = share.begin * kLine, size = (share.end - share.begin) * kLine;
      int64_t width = std::min(size, p.width - column);
      std::vector<float> sums(size), totals(p.rows * p.tokens * size);
      std::vector<int64_t> next(p.rows), end;
      for (const auto& each : terms) end.push_back(size ? each.chunks.count : 0);
      auto first = [&](int64_t b, int64_t chunk) { return terms[b].rows[terms[b].chunks.begin(chunk)]; };
      go_side_by_side(next, end, first, [&](int64_t b, int64_t chunk) {
        const Terms<T>& its = terms[b];
        for (int64_t m = 0; m < p.tokens; m++) {
          std::fill(sums.begin(), sums.end(), 0.0f);
          add_chunk(its.of(of[b]), its.chunks, chunk, column, width, its.weights.data() + m * its.stride, sums.data());
          float* to = totals.data() + (b * p.tokens + m) * size;
          for (int64_t c = 0; c < size; c++) to[c] += sums[c];
        }
      });
      for (int64_t i = 0; i < p.rows * p.tokens; i++)
        write_sums<T>(of[i / p.tokens], i % p.tokens, column, width, totals.data() + i * size);
    }
  }
};

template <class T>
void each_of(const Each& p) {
  using Its = std::conditional_t<kTiles<T>, TileSets, Sets<T>>;
  Its sets(p);
  int64_t size = sets.begin[p.rows] * p.tokens;
  std::unique_ptr<T[]> gated(new T[size]), z(new T[size]);
  sets.linear(p.gate, p.gate_stride, p.gate_bias, gated.get());
  sets.linear(p.up, p.up_stride, p.up_bias, z.get());
  activate_of<T>({p.dtype, p.kind, gated.get(), nullptr, size, gated.get(), p.threads});
  weigh_of<T>({p.dtype, gated.get(), 1, size, size, nullptr, z.get(), p.threads});
  sets.project(z.get());
}

}  // namespace

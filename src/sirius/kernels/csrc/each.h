// Gated MLPs of rows of a batch that each have neurons of their own, bit for bit what a row alone comes to: its products
// and its sums are those of linear.h and project.h, in their order. The rows go through the weights side by side, from
// the first neuron to the last, so that what several of them need is read from memory once.

#pragma once

#include <memory>
#include <vector>

#include "linear.h"
#include "pointwise.h"
#include "project.h"

namespace {

constexpr int kRun = 2 * kFewRows;  // neurons of a row at a time

// The rows' pieces of work, those of a row in turn, and of all rows always the one whose first neuron is the lowest.
struct Walk {
  struct Row {
    int64_t next, end;  // pieces
  };
  std::vector<Row> rows;

  template <class First, class Do>
  void go(First first, Do piece) {
    for (;;) {
      int64_t lowest = INT64_MAX, found = -1;
      for (int64_t b = 0; b < int64_t(rows.size()); b++) {
        if (rows[b].next == rows[b].end) continue;
        int64_t neuron = first(b, rows[b].next);
        if (neuron < lowest) lowest = neuron, found = b;
      }
      if (found < 0) return;
      piece(found, rows[found].next++);
    }
  }
};

// The products of M of a row's tokens, from `token` on, with a run of its neurons.
template <class T, int M, class Fetch>
void dot_run(const Linear& p, const typename DotRow<T>::Element* x, int64_t stride, int64_t token, int64_t first,
             Fetch fetch) {
  constexpr int R = M == 1 ? kRun : kFewRows;
  Rows<T> rows{static_cast<const T*>(p.w), p.stride, p.count, p.index};
  for (int64_t i = first; i < std::min(first + kRun, p.count); i += R) {
    Floats sums[M][R];
    dot_rows<R, M>(x + token * stride, stride, rows_from<T, R>(rows, i).data(), p.width, sums, fetch);
    write_dots<T, R, M>(p, token, i, 1, p.count, sums);
  }
}

// What the threads share of a call.
template <class T>
struct Sets {
  const Each& p;
  std::vector<int64_t> begin;   // of each row's index, and the end of the last one's
  std::vector<int64_t> needed;  // neurons that any row has
  int64_t width;                // of a token's x, padded
  std::vector<typename DotRow<T>::Vector> x;

  explicit Sets(const Each& p) : p(p), begin(p.rows + 1), width((p.width + kLine - 1) / kLine * kLine) {
    for (int64_t b = 0; b < p.rows; b++) begin[b + 1] = begin[b] + p.counts[b];
    x = unpack_tokens<T>(Linear{p.dtype, p.x, p.rows * p.tokens, p.width}, width);
    std::vector<uint8_t> has(p.height);
    for (int64_t i = 0; i < begin[p.rows]; i++) has[p.index[i]] = 1;
    for (int64_t i = 0; i < p.height; i++)
      if (has[i]) needed.push_back(i);
  }

  // Of a row, [tokens, counts[b]].
  T* numbers(T* z, int64_t b) const { return z + begin[b] * p.tokens; }

  void linear(const void* w, int64_t stride, const void* bias, T* z) const {
    const auto* tokens = reinterpret_cast<const typename DotRow<T>::Element*>(x.data());
#pragma omp parallel num_threads(p.threads)
    {
      Walk walk;
      for (int64_t b = 0; b < p.rows; b++) {
        Share share((p.counts[b] + kRun - 1) / kRun);
        walk.rows.push_back({share.begin, share.end});
      }
      walk.go([&](int64_t b, int64_t run) { return p.index[begin[b] + run * kRun]; },
              [&](int64_t b, int64_t run) {
                Linear of{p.dtype, nullptr, p.tokens, p.width, w, stride, p.counts[b], p.index + begin[b], bias,
                          numbers(z, b), 1};
                const auto* x = tokens + b * p.tokens * width;
                auto fetch = [](int64_t) {};
                for (int64_t m = 0; m < p.tokens; m += 4) switch (p.tokens - m) {
                    case 1: dot_run<T, 1>(of, x, width, m, run * kRun, fetch); break;
                    case 2: dot_run<T, 2>(of, x, width, m, run * kRun, fetch); break;
                    case 3: dot_run<T, 3>(of, x, width, m, run * kRun, fetch); break;
                    default: dot_run<T, 4>(of, x, width, m, run * kRun, fetch);
                  }
              });
    }
  }

  void project(T* z) const {
    std::vector<Project> of(p.rows);
    std::vector<std::unique_ptr<Terms<T>>> terms(p.rows);
#pragma omp parallel for num_threads(p.threads)
    for (int64_t b = 0; b < p.rows; b++) {
      of[b] = {p.dtype, numbers(z, b), p.tokens, p.counts[b], p.index + begin[b], p.down, p.down_stride, p.width,
               p.bias, static_cast<T*>(p.y) + b * p.tokens * p.width, 1};
      terms[b].reset(new Terms<T>(terms_of<T>(of[b])));
    }
#pragma omp parallel num_threads(p.threads)
    {
      Share share((p.width + kLine - 1) / kLine);
      int64_t left = share.begin * kLine, right = std::min(share.end * kLine, p.width), size = (share.end - share.begin) * kLine;
      std::vector<float> sums(size), totals(p.rows * p.tokens * size);
      Walk walk;
      for (auto& each : terms) walk.rows.push_back({0, each->chunks.count});
      walk.go([&](int64_t b, int64_t chunk) { return terms[b]->rows[terms[b]->chunks.begin(chunk)]; },
              [&](int64_t b, int64_t chunk) {
                for (int64_t m = 0; m < p.tokens; m++) {
                  std::fill(sums.begin(), sums.end(), 0.0f);
                  add_chunk(terms[b]->of(of[b]), terms[b]->chunks, chunk, left, right - left,
                            terms[b]->weights.data() + m * terms[b]->stride, sums.data());
                  float* to = totals.data() + (b * p.tokens + m) * size;
                  for (int64_t c = 0; c < size; c++) to[c] += sums[c];
                }
              });
      for (int64_t b = 0; b < p.rows; b++)
        for (int64_t m = 0; m < p.tokens; m++)
          write_sums<T>(of[b], m, left, right - left, totals.data() + (b * p.tokens + m) * size);
    }
  }
};

template <class T>
void each_of(const Each& p) {
  Sets<T> sets(p);
  int64_t size = sets.begin[p.rows] * p.tokens;
  std::unique_ptr<T[]> gated(new T[size]), z(new T[size]);
  sets.linear(p.gate, p.gate_stride, p.gate_bias, gated.get());
  sets.linear(p.up, p.up_stride, p.up_bias, z.get());
  activate_of<T>({p.dtype, p.kind, gated.get(), nullptr, size, gated.get(), p.threads});
  weigh_of<T>({p.dtype, gated.get(), 1, size, size, nullptr, z.get(), p.threads});
  sets.project(z.get());
}

}  // namespace

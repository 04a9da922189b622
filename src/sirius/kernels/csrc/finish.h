// From the gates to the end of a gated MLP, neuron by neuron: where a neuron's rows of up and down lie together, they
// are read in one run.

#pragma once

#include <memory>
#include <vector>

#include "linear.h"
#include "pointwise.h"
#include "strips.h"

namespace {

// What the threads share of a call.
template <class T>
struct Finishing {
  const Finish& p;
  Chunks chunks;
  std::vector<int64_t> order, index;  // the place of each term among the gates, and the row
  int64_t width;                      // of a token's x, padded, and of its sums
  std::vector<typename DotRow<T>::Vector> x;
  std::unique_ptr<float[]> sums;  // [tokens, chunks, width]

  explicit Finishing(const Finish& p)
      : p(p), chunks(p.count), order(order_of(chunks)), index(order), width((p.width + kLine - 1) / kLine * kLine) {
    if (p.index)
      for (int64_t& row : index) row = p.index[row];
    x = unpack_tokens<T>(Linear{p.dtype, p.x, p.rows, p.width}, width);
    sums.reset(new float[p.rows * chunks.count * width]);
  }

  const auto* tokens() const { return reinterpret_cast<const typename DotRow<T>::Element*>(x.data()); }
  Rows<T> up() const { return {static_cast<const T*>(p.up), p.up_stride, p.count, index.data()}; }
  Rows<T> down() const { return {static_cast<const T*>(p.down), p.down_stride, p.count, index.data()}; }
  float* sums_of(int64_t token, int64_t chunk) const { return sums.get() + (token * chunks.count + chunk) * width; }

  // What a neuron sends on: its gate times what up makes of the token, rounded as tensors of T would keep them.
  T sent(int64_t token, int64_t place, Floats dots) const {
    const T *gated = static_cast<const T*>(p.gated), *bias = static_cast<const T*>(p.up_bias);
    T up, z;
    narrow(sum(dots) + (bias ? widen(bias[index[place]]) : 0), &up);
    narrow(widen(gated[token * p.size + (p.by_place ? order : index)[place]]) * widen(up), &z);
    return z;
  }
};

// Adds the rows of down of some neurons, from `first` on, weighed by what they send on, to a chunk's sums of M tokens.
template <class T, int M>
void finish_rows(const Finishing<T>& all, int64_t chunk, int64_t first, int64_t count) {
  constexpr int R = kFewRows, N = reads<T>(R);
  Rows<T> up = all.up(), down = all.down();
  auto row = rows_from<T, R>(up, first), below = rows_from<T, R>(down, first);
  int64_t width = all.p.width;
  Floats dots[M][R];
  dot_rows<R, M>(all.tokens(), all.width, row.data(), width, dots, [&](int64_t h) __attribute__((always_inline)) {
    for (int r = 0; r < R; r++) row[r].fetch(below[r], h, width);
  });
  SumRow<T> from[N], next[N];
  for (int r = 0; r < N; r++) {
    from[r] = SumRow<T>::at(down, first + r * kTaken<T>, 0);
    next[r] = SumRow<T>::at(up, first + R + r * kTaken<T>, 0);
  }
  Rows<T> last{down.w, down.stride, count, down.index + first};
  for (int m = 0; m < M; m++) {
    typename SumRow<T>::Element z[N] = {};
    float* sums = all.sums_of(m, chunk);
    for (int64_t r = 0; r < count; r++) set_weight(z, r, all.sent(m, first + r, dots[m][r]));
    if (count == R)
      add_rows<N>(from, next, z, sums, width);
    else
      add_blocks<T, 1>(last, add_blocks<T, 2>(last, 0, count, 0, z, sums, width), count, 0, z, sums, width);
  }
}

template <class T, int M>
void finish_few(const Finish& p) {
  Finishing<T> all(p);
#pragma omp parallel num_threads(p.threads)
  {
    Share share(all.chunks.count);
    for (int64_t chunk = share.begin; chunk < share.end; chunk++) {
      for (int m = 0; m < M; m++) std::fill(all.sums_of(m, chunk), all.sums_of(m, chunk) + all.width, 0.0f);
      int64_t end = all.chunks.begin(chunk + 1);
      for (int64_t i = all.chunks.begin(chunk); i < end; i += kFewRows)
        finish_rows<T, M>(all, chunk, i, std::min<int64_t>(kFewRows, end - i));
    }
#pragma omp barrier
    for (int m = 0; m < M; m++) join_chunks<T>(p, m, all.chunks, all.sums_of(m, 0), all.width);
  }
}

// First all of up, then all of down.
template <class T>
void finish_many(const Finish& p) {
  std::unique_ptr<T[]> z(new T[p.rows * p.count]);
  linear_of<T>({p.dtype, p.x, p.rows, p.width, p.up, p.up_stride, p.count, p.index, p.up_bias, z.get(), p.threads});
  weigh_of<T>({p.dtype, p.gated, p.rows, p.size, p.count, p.by_place ? nullptr : p.index, z.get(), p.threads});
  project_of<T>({p.dtype, z.get(), p.rows, p.count, p.index, p.down, p.down_stride, p.width, p.bias, p.y, p.threads});
}

// Whole matrices of numbers that are multiplied as they are come faster as one stream each; many tokens are bound by
// arithmetic; and threads share whole chunks here.
template <class T>
void finish_of(const Finish& p) {
  bool stream = kDots<T> && !p.index;
  bool few = p.rows > 0 && p.rows <= kTileTokens;
  if (kTiles<T> || stream || !few || Chunks(p.count).count < p.threads) return finish_many<T>(p);
  for_tokens(p.rows, [&](auto M) __attribute__((always_inline)) { finish_few<T, M>(p); });
}

}  // namespace

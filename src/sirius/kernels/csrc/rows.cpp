// Products with some rows of a weight matrix, memory-bound for few tokens and compute-bound for many.
//
// Compiled once for each instruction set (SIRIUS_ISA), with vectors of SIRIUS_WIDTH floats. Few tokens read rows where
// they lie, some at a time, with what follows fetched ahead: rows that are short or skipped leave the hardware's
// prefetcher behind. Many tokens share a panel of widened rows in the first-level cache. All sums are float.

#include "rows.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "formats.h"

namespace {

constexpr int kFewRows = 4;      // weight rows at a time where tokens are few
constexpr int64_t kAhead = 512;  // bytes of a row that are fetched ahead
constexpr int64_t kChunk = 256;  // most rows that project adds up before it adds their sum to the others'

// Tiles whose sums stay in registers (16, or 32 with AVX-512): tokens x weight rows (linear) or vectors (project).
constexpr int kTileTokens = 4, kTile = kVector == 16 ? 6 : 3;
constexpr int64_t kBatch = 16;                      // tokens that share widened weights
constexpr int64_t kGroup = 12, kStretch = 256;      // of linear: rows x elements that meet a batch in the cache
constexpr int64_t kPanelRows = 16, kColumns = 192;  // of project: likewise

// The rows of a product; past the end the last one again.
template <class T>
struct Rows {
  const T* w;
  int64_t width, count;
  const int64_t* index;

  const T* operator[](int64_t i) const {
    i = std::min(i, count - 1);
    return w + (index ? index[i] : i) * width;
  }
};

// Fetches what lies kAhead bytes beyond a step of a row, going on in the next one.
template <class T>
inline void fetch_ahead(const T* row, const T* next, int64_t at, int64_t width) {
  constexpr int64_t ahead = kAhead / sizeof(T), line = kLine / sizeof(T);
  for (int64_t i = at + ahead; i < at + ahead + kStep<T>; i += line)
    __builtin_prefetch(i < width ? row + i : next + i - width);
}

// Writes what a row's products with a token add up to.
template <class T>
void write_dot(const Linear& p, int64_t token, int64_t i, Floats sums) {
  const T* bias = static_cast<const T*>(p.bias);
  float dot = sum(sums) + (bias ? widen(bias[p.index ? p.index[i] : i]) : 0);
  narrow(dot, static_cast<T*>(p.y) + token * p.count + i);
}

// Adds the products of M tokens' x, `stride` apart, with R rows.
template <class T, int R, int M>
void dot_rows(const float* x, int64_t stride, const T* const* row, const T* const* next, int64_t width,
              Floats (*sums)[R]) {
  Floats acc[M][R] = {};
  auto add = [&](int64_t h, auto&& loaded) {
    Floats a[R];
    for (int r = 0; r < R; r++) a[r] = loaded(row[r]);
    for (int m = 0; m < M; m++) {
      Floats b = load(x + m * stride + h);
      for (int r = 0; r < R; r++) acc[m][r] += a[r] * b;
    }
  };
  int64_t h = 0;
  for (; h + kStep<T> <= width; h += kStep<T>) {
    for (int r = 0; r < R; r++) fetch_ahead(row[r], next[r], h, width);
#pragma GCC unroll 8
    for (int64_t v = h; v < h + kStep<T>; v += 2 * kVector) {
      add(v, [&](const T* p) { return load_half(p + v, 0); });
      add(v + kVector, [&](const T* p) { return load_half(p + v, 1); });
    }
  }
  for (; h + kVector <= width; h += kVector) add(h, [&](const T* p) { return load(p + h); });
  if (h < width) add(h, [&](const T* p) { return load_part(p + h, width - h); });
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) sums[m][r] = acc[m][r];
}

template <class T, int M>
void linear_few(const Linear& p, const float* x, int64_t stride) {
  constexpr int R = kFewRows;
  Rows<T> rows{static_cast<const T*>(p.w), p.width, p.count, p.index};
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t first = 0; first < p.count; first += R) {
    const T *row[R], *next[R];
    for (int r = 0; r < R; r++) row[r] = rows[first + r], next[r] = rows[first + R + r];
    Floats sums[M][R];
    dot_rows<T, R, M>(x, stride, row, next, p.width, sums);
    for (int64_t r = 0; r < std::min<int64_t>(R, p.count - first); r++)
      for (int m = 0; m < M; m++) write_dot<T>(p, m, first + r, sums[m][r]);
  }
}

// Adds the products of M tokens' x with a panel of kTile rows, over a stretch of the width. A whole stretch of rows
// that are still to be widened, and `ahead` of them the next to fetch, is written to the panel on the way.
template <int M, class T = float>
void dot_tile(const float* x, float* panel, int64_t width, Floats (*sums)[kTile], const T* const* row = nullptr,
              const T* const* ahead = nullptr) {
  Floats acc[M][kTile];
  for (int i = 0; i < M * kTile; i++) acc[i / kTile][i % kTile] = sums[i / kTile][i % kTile];
  auto add = [&](int64_t h, auto&& loaded) {
    Floats a[kTile];
    for (int r = 0; r < kTile; r++) a[r] = loaded(r);
    for (int m = 0; m < M; m++) {
      Floats b = load(x + m * kStretch + h);
      for (int r = 0; r < kTile; r++) acc[m][r] += a[r] * b;
    }
  };
  auto widened = [&](int64_t h) { return [=](int r) { return load(panel + r * kStretch + h); }; };
  auto fresh = [&](int64_t h, int half) {
    return [=](int r) {
      Floats a = load_half(row[r] + h, half);
      store(panel + r * kStretch + h + half * kVector, a);
      return a;
    };
  };
  if (row)
    for (int64_t h = 0; h < kStretch; h += 2 * kVector) {
      for (int r = 0; r < kTile; r++) __builtin_prefetch(ahead[r] + h);
      add(h, fresh(h, 0));
      add(h + kVector, fresh(h, 1));
    }
  else if (width == kStretch)  // a loop of known length takes a tenth less time
    for (int64_t h = 0; h < kStretch; h += kVector) add(h, widened(h));
  else
    for (int64_t h = 0; h < width; h += kVector) add(h, widened(h));
  for (int i = 0; i < M * kTile; i++) sums[i / kTile][i % kTile] = acc[i / kTile][i % kTile];
}

template <class T, class... Fresh>
void dot_tokens(const float* x, int64_t tokens, float* panel, int64_t width, Floats (*sums)[kTile], Fresh... fresh) {
  switch (tokens) {
    case 1: return dot_tile<1, T>(x, panel, width, sums, fresh...);
    case 2: return dot_tile<2, T>(x, panel, width, sums, fresh...);
    case 3: return dot_tile<3, T>(x, panel, width, sums, fresh...);
    default: return dot_tile<kTileTokens, T>(x, panel, width, sums, fresh...);
  }
}

// The products of kGroup rows from `first` on with some tokens, stretch by stretch of the width.
template <class T>
void linear_rows(const Linear& p, const float* x, int64_t token, int64_t tokens, int64_t first) {
  alignas(kLine) float panel[kTile * kStretch];
  Floats sums[kGroup / kTile][kBatch][kTile] = {};
  Rows<T> rows{static_cast<const T*>(p.w), p.width, p.count, p.index};
  for (int64_t h = 0; h < p.width; h += kStretch) {
    int64_t width = std::min(kStretch, p.width - h), whole = (width + kVector - 1) / kVector * kVector;
    const float* at = x + h * p.rows + token * kStretch;
    for (int64_t g = 0; g < kGroup / kTile; g++) {
      const T *row[kTile], *ahead[kTile];
      for (int64_t r = 0, i = first + g * kTile; r < kTile; r++, i++) {
        row[r] = rows[i] + h;
        ahead[r] = h + kStretch < p.width ? row[r] + kStretch : rows[i + kGroup];
        if (width < kStretch) widen_row(row[r], width, panel + r * kStretch);
      }
      int64_t m = 0;
      if (width == kStretch) {
        dot_tokens<T>(at, tokens, panel, width, sums[g], row, ahead);
        m += kTileTokens;
      }
      for (; m < tokens; m += kTileTokens)
        dot_tokens<float>(at + m * kStretch, tokens - m, panel, whole, sums[g] + m);
    }
  }
  for (int64_t r = 0; r < std::min(kGroup, p.count - first); r++)
    for (int64_t m = 0; m < tokens; m++) write_dot<T>(p, token + m, first + r, sums[r / kTile][m][r % kTile]);
}

// Tokens widened: [stretches of the width, tokens, stretch].
template <class T>
std::vector<Floats> widen_tokens(const Linear& p, int64_t stretch) {
  std::vector<Floats> x((p.width + stretch - 1) / stretch * stretch * p.rows / kVector);
  for (int64_t m = 0; m < p.rows; m++)
    for (int64_t h = 0; h < p.width; h += stretch)
      widen_row(static_cast<const T*>(p.x) + m * p.width + h, std::min(stretch, p.width - h),
                reinterpret_cast<float*>(x.data()) + h * p.rows + m * stretch);
  return x;
}

template <class T>
void linear_of(const Linear& p) {
  int64_t stretch = p.rows > 2 ? kStretch : (p.width + kVector - 1) / kVector * kVector;
  std::vector<Floats> wide = widen_tokens<T>(p, stretch);
  const float* x = reinterpret_cast<const float*>(wide.data());
  if (p.rows == 1) return linear_few<T, 1>(p, x, stretch);
  if (p.rows == 2) return linear_few<T, 2>(p, x, stretch);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t first = 0; first < p.count; first += kGroup)
    for (int64_t m = 0; m < p.rows; m += kBatch) linear_rows<T>(p, x, m, std::min(kBatch, p.rows - m), first);
}

// What project adds up: rows are cut into chunks whose sums are added in turn, always the same ones, so that threads
// can share them.
struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t rows) : rows(rows), count((rows + kChunk - 1) / kChunk) {}
  int64_t begin(int64_t chunk) const { return chunk * rows / count; }
};

// This thread's part of some pieces of work.
struct Share {
  int64_t begin, end;
  explicit Share(int64_t pieces)
      : begin(omp_get_thread_num() * pieces / omp_get_num_threads()),
        end((omp_get_thread_num() + 1) * pieces / omp_get_num_threads()) {}
};

// Writes a token's sums of some columns, which are in the order of widened elements.
template <class T>
void write_sums(const Project& p, int64_t token, int64_t column, int64_t width, const float* sums) {
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

// Adds z[0 .. R) times R rows to the sums of one token.
template <class T, int R>
void add_rows(const T* const* row, const T* const* next, const float* z, float* sums, int64_t width) {
  auto add = [&](int64_t c, auto&& loaded) {
    Floats s = load(sums + c);
    for (int r = 0; r < R; r++) s += loaded(row[r] + c) * z[r];
    store(sums + c, s);
  };
  auto add_two = [&](int64_t c) {
    Floats s = load(sums + c), t = load(sums + c + kVector);
    for (int r = 0; r < R; r++) {
      s += load_half(row[r] + c, 0) * z[r];
      t += load_half(row[r] + c, 1) * z[r];
    }
    store(sums + c, s);
    store(sums + c + kVector, t);
  };
  int64_t c = 0;
  for (; c + kStep<T> <= width; c += kStep<T>) {
    for (int r = 0; r < R; r++) fetch_ahead(row[r], next[r], c, width);
#pragma GCC unroll 8
    for (int64_t v = c; v < c + kStep<T>; v += 2 * kVector) add_two(v);
  }
  for (; c + kVector <= width; c += kVector) add(c, [](const T* p) { return load(p); });
  if (c < width) add(c, [&](const T* p) { return load_part(p, width - c); });
}

// Adds rows i .. end - 1 in whole blocks of R, and returns the first that is left.
template <class T, int R>
int64_t add_blocks(const Rows<T>& rows, int64_t i, int64_t end, int64_t column, const float* z, float* sums,
                   int64_t width) {
  for (; i + R <= end; i += R) {
    const T *row[R], *next[R];
    for (int r = 0; r < R; r++) row[r] = rows[i + r] + column, next[r] = rows[i + R + r] + column;
    add_rows<T, R>(row, next, z + i, sums, width);
  }
  return i;
}

// Adds up some columns of a chunk's rows.
template <class T>
void add_chunk(const Rows<T>& rows, const Chunks& chunks, int64_t chunk, int64_t column, int64_t width, const float* z,
               float* sums) {
  int64_t last = chunks.begin(chunk + 1);
  int64_t i = add_blocks<T, kFewRows>(rows, chunks.begin(chunk), last, column, z, sums, width);
  add_blocks<T, 1>(rows, i, last, column, z, sums, width);
}

// One token: threads share the columns of all chunks, chunk by chunk, so that most rows are read whole.
template <class T>
void project_one(const Project& p, const float* z) {
  Chunks chunks(p.count);
  Rows<T> rows{static_cast<const T*>(p.w), p.width, p.count, p.index};
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
      add_chunk(rows, chunks, chunk, column, std::min(taken * kLine, p.width - column), z, to);
    }
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (int64_t column = 0; column < p.width; column += kLine) {
      float totals[kLine] = {};
      for (int64_t chunk = 0; chunk < chunks.count; chunk++)
        for (int64_t c = 0; c < kLine; c++) totals[c] += sums[chunk * stride + column + c];
      write_sums<T>(p, 0, column, std::min<int64_t>(kLine, p.width - column), totals);
    }
  }
}

// Adds rows of a panel [rows, kColumns], weighed by z, to `width` sums of M tokens.
template <int M>
void add_panel(const float* panel, int64_t width, int64_t rows, const float* z, int64_t stride, float* sums) {
  for (int64_t c = 0; c < width; c += kTile * kVector) {
    Floats acc[M][kTile];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kTile; v++) acc[m][v] = load(sums + m * kColumns + c + v * kVector);
    int64_t r = 0;
    do {  // there is a row; a loop that may not run at all keeps the sums twice
      Floats a[kTile];
      for (int v = 0; v < kTile; v++) a[v] = load(panel + r * kColumns + c + v * kVector);
      for (int m = 0; m < M; m++)
        for (int v = 0; v < kTile; v++) acc[m][v] += a[v] * z[m * stride + r];
    } while (++r < rows);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kTile; v++) store(sums + m * kColumns + c + v * kVector, acc[m][v]);
  }
}

void add_tokens(const float* panel, int64_t width, int64_t rows, const float* z, int64_t stride, int64_t tokens,
                float* sums) {
  switch (tokens) {
    case 1: return add_panel<1>(panel, width, rows, z, stride, sums);
    case 2: return add_panel<2>(panel, width, rows, z, stride, sums);
    case 3: return add_panel<3>(panel, width, rows, z, stride, sums);
    default: return add_panel<kTileTokens>(panel, width, rows, z, stride, sums);
  }
}

// The sums of some tokens, at most kColumns columns from `column` on.
template <class T>
void project_columns(const Project& p, const float* z, int64_t token, int64_t tokens, int64_t column, int64_t width) {
  alignas(kLine) float panel[kPanelRows * kColumns] = {};
  alignas(kLine) float sums[kBatch * kColumns], totals[kBatch * kColumns] = {};
  Chunks chunks(p.count);
  Rows<T> rows{static_cast<const T*>(p.w), p.width, p.count, p.index};
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    std::fill(sums, sums + tokens * kColumns, 0.0f);
    int64_t last = chunks.begin(chunk + 1);
    for (int64_t i = chunks.begin(chunk); i < last; i += kPanelRows) {
      int64_t depth = std::min(kPanelRows, last - i);
      for (int64_t r = 0; r < depth; r++) widen_row(rows[i + r] + column, width, panel + r * kColumns);
      for (int64_t m = 0; m < tokens; m += kTileTokens) {
        for (int64_t r = m * kPanelRows / tokens; r < std::min(m + kTileTokens, tokens) * kPanelRows / tokens; r++)
          for (int64_t c = 0; c < width; c += kLine / sizeof(T))
            __builtin_prefetch(rows[i + kPanelRows + r] + column + c);
        add_tokens(panel, width, depth, z + (token + m) * p.count + i, p.count, tokens - m, sums + m * kColumns);
      }
    }
    for (int64_t i = 0; i < tokens * kColumns; i++) totals[i] += sums[i];
  }
  for (int64_t m = 0; m < tokens; m++) write_sums<T>(p, token + m, column, width, totals + m * kColumns);
}

template <class T>
void project_of(const Project& p) {
  std::vector<float> z(p.rows * p.count);
  for (size_t i = 0; i < z.size(); i++) z[i] = widen(static_cast<const T*>(p.z)[i]);
  if (p.rows == 1) return project_one<T>(p, z.data());
#pragma omp parallel num_threads(p.threads)
  {
    Share share((p.width + kLine - 1) / kLine);
    int64_t end = std::min(share.end * kLine, p.width);
    for (int64_t column = share.begin * kLine; column < end; column += kColumns)
      for (int64_t m = 0; m < p.rows; m += kBatch)
        project_columns<T>(p, z.data(), m, std::min(kBatch, p.rows - m), column, std::min(kColumns, end - column));
  }
}

void linear(const Linear& p) {
  switch (p.dtype) {
    case kFloat32: return linear_of<float>(p);
    case kBFloat16: return linear_of<BFloat16>(p);
    case kFloat16: return linear_of<Float16>(p);
  }
}

void project(const Project& p) {
  switch (p.dtype) {
    case kFloat32: return project_of<float>(p);
    case kBFloat16: return project_of<BFloat16>(p);
    case kFloat16: return project_of<Float16>(p);
  }
}

}  // namespace

#define JOINED(a, b) a##b
#define NAMED(isa) JOINED(kernels_, isa)
#define QUOTED(isa) #isa
#define STRING(isa) QUOTED(isa)

extern const Kernels NAMED(SIRIUS_ISA) = {STRING(SIRIUS_ISA), linear, project};

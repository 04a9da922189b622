// Gated MLPs of rows that each have neurons of their own, by tiles: each.h says how rows share what they read.

#pragma once

#include <vector>

#include "amx_linear.h"
#include "amx_project.h"

namespace {

// Goes through the rows' pieces of work, from next[b] to end[b]: always that of the lowest first neuron among the rows'
// next ones. Where sets are no ascending ones the rows only meet less often.
template <class First, class Do>
void go_side_by_side(std::vector<int64_t> next, const std::vector<int64_t>& end, First first, Do piece) {
  for (;;) {
    int64_t lowest = INT64_MAX, row = -1;
    for (int64_t b = 0; b < int64_t(next.size()); b++)
      if (next[b] < end[b] && first(b, next[b]) < lowest) lowest = first(b, next[b]), row = b;
    if (row < 0) return;
    piece(row, next[row]++);
  }
}

#if defined(__AMX_BF16__)

// What the steps of a call share.
struct TileSets {
  const Each& p;
  std::vector<int64_t> begin;  // of each row's part of the index, and the end
  std::vector<TileTokens> x;   // of each row

  explicit TileSets(const Each& p) : p(p), begin(p.rows + 1) {
    for (int64_t b = 0; b < p.rows; b++) begin[b + 1] = begin[b] + p.counts[b];
    for (int64_t b = 0; b < p.rows; b++)
      x.emplace_back(static_cast<const BFloat16*>(p.x) + b * p.tokens * p.width, p.tokens, p.width);
  }

  // y: of each row one after the other, its tokens' products with its neurons
  void linear(const void* w, int64_t stride, const void* bias, BFloat16* y) const {
    std::vector<Linear> of;
    for (int64_t b = 0; b < p.rows; b++)
      of.push_back({p.dtype, nullptr, p.tokens, p.width, w, stride, p.counts[b], p.index + begin[b], bias,
                    y + begin[b] * p.tokens, 1});
#pragma omp parallel num_threads(p.threads)
    {
      TileShapes tiles = linear_shapes(std::min(p.tokens, kTileRows));
      tiles.use();
      std::vector<int64_t> next(p.rows), end;
      std::vector<Copied> sources;
      for (const Linear& its : of) {
        Share share(tiles_of(its.count, kTileRows));
        Unit unit{share.begin * kTileRows, std::min(share.end * kTileRows, its.count), 0, p.width};
        sources.emplace_back(its, unit, 1, kTileRows);
        end.push_back(share.end - share.begin);
      }
      auto first = [&](int64_t b, int64_t group) { return of[b].index[sources[b].rows(group).first]; };
      go_side_by_side(next, end, first, [&](int64_t b, int64_t group) {
        dot_group(of[b], x[b], group, end[b], sources[b]);
      });
    }
  }

  void project(const BFloat16* z) const {
    std::vector<Project> of;
    std::vector<PartSums> all;
    for (int64_t b = 0; b < p.rows; b++) {
      of.push_back({p.dtype, z + begin[b] * p.tokens, p.tokens, p.counts[b], p.index + begin[b], p.down, p.down_stride,
                    p.width, p.bias, static_cast<BFloat16*>(p.y) + b * p.tokens * p.width, 1});
      all.emplace_back(of[b]);
    }
#pragma omp parallel num_threads(p.threads)
    {
      TileShapes tiles = project_shapes(std::min(p.tokens, kTileRows));
      tiles.use();
      Share share(tiles_of(p.width, kLine));  // of the columns
      int64_t column = share.begin * kLine, last = std::min(p.width, share.end * kLine);
      std::vector<int64_t> next(p.rows), end;
      std::vector<PartAdder> adders;
      std::vector<Unit> units;
      for (int64_t b = 0; b < p.rows; b++) units.push_back({0, p.counts[b], column, last});
      for (int64_t b = 0; b < p.rows; b++) {
        adders.emplace_back(of[b], all[b], &units[b], &units[b] + 1);
        end.push_back(column < last ? tiles_of(p.counts[b], kSheetRows) : 0);
      }
      auto first = [&](int64_t b, int64_t sheet) { return of[b].index[sheet * kSheetRows]; };
      go_side_by_side(next, end, first, [&](int64_t b, int64_t sheet) {
        adders[b].add(sheet * kSheetRows, column, last);
      });
      for (int64_t b = 0; b < p.rows; b++)
        for (int64_t m = 0; m < p.tokens; m++)
          for (int64_t c = column; c < last; c += kDeepTile) join_parts(of[b], all[b], m, c);
    }
  }
};

#else

struct TileSets;

#endif

}  // namespace

// Dot products of tokens with rows of a bfloat16 weight, by tiles: A is 16 rows of the weight, B the tokens.

#pragma once

#include <array>
#include <vector>

#include "amx.h"

namespace {

#if defined(__AMX_BF16__)

// Tokens in tiles: [tiles of tokens, tiles of the width, 16 pairs, tokens of a tile, 2], zeros beyond the end.
struct TileTokens {
  int64_t tokens, tiles, deep;  // tokens of a tile; tiles of tokens; tiles of the width
  std::vector<Words> numbers;

  TileTokens(const BFloat16* x, int64_t rows, int64_t width)
      : tokens(std::min(rows, kTileRows)), tiles(tiles_of(rows, kTileRows)), deep(tiles_of(width, kDeepTile)),
        numbers(tiles * deep * tokens) {
    auto* to = reinterpret_cast<uint32_t*>(numbers.data());
    for (int64_t m = 0; m < rows; m++) {
      const BFloat16* from = x + m * width;
      uint32_t* at = to + m / kTileRows * deep * kTileRows * tokens + m % kTileRows;
      for (int64_t pair = 0; pair < width / 2; pair++) memcpy(at + pair * tokens, from + 2 * pair, 4);
      if (width % 2) memcpy(at + width / 2 * tokens, from + width - 1, 2);
    }
  }

  const BFloat16* at(int64_t tile) const {
    return reinterpret_cast<const BFloat16*>(numbers.data()) + tile * deep * kDeepTile * tokens;
  }
};

// Where the rows of a tile are: `apart` from the first one on, before `last`.
struct TileOfRows {
  int64_t first, apart, last;
};

// Writes the products of a tile of rows with a tile of tokens: sums [16, tokens].
inline void write_tile(const Linear& p, const TileOfRows& rows, int64_t token, int64_t tokens, const float* sums) {
  const auto* bias = static_cast<const BFloat16*>(p.bias);
  int64_t count = std::min(kTileRows, (rows.last - rows.first + rows.apart - 1) / rows.apart);
  Floats added = {};
  Words places;
  for (int r = 0; r < kVector; r++) places[r] = r * tokens;
  if (bias)
    for (int64_t r = 0, i = rows.first; r < count; r++, i += rows.apart)
      added[r] = widen(bias[p.index ? p.index[i] : i]);
  for (int64_t m = 0; m < std::min(tokens, p.rows - token); m++) {
    Floats column = (Floats)_mm512_i32gather_ps((__m512i)places, sums + m, sizeof(float));
    auto* to = static_cast<BFloat16*>(p.y) + (token + m) * p.count + rows.first;
    BFloat16 narrowed[kVector];
    store_narrow(column + added, narrowed);
    if (rows.apart == 1) memcpy(to, narrowed, count * sizeof(BFloat16));
    else
      for (int64_t r = 0; r < count; r++) to[r * rows.apart] = narrowed[r];
  }
}

// Two neighbouring tiles of rows where they lie, while those after them are fetched.
struct InPlace {
  static constexpr int kBeside = 2;
  const Linear& p;
  const Unit& unit;
  TileAhead ahead;
  int64_t stride;
  const char* at = nullptr;

  InPlace(const Linear& p, const Unit& unit)
      : p(p), unit(unit), ahead({static_cast<const BFloat16*>(p.w), p.stride, p.count, p.index}, &unit, &unit + 1),
        stride(p.stride * sizeof(BFloat16)) {
    ahead.fetch(kBeside * kTileRows * tiles_of(p.width, kDeepTile));
  }

  static bool fits(const Linear& p) { return !p.index && p.width % kDeepTile == 0 && p.count % kTileRows == 0; }
  TileOfRows rows(int64_t tile) const { return {unit.row + tile * kTileRows, 1, unit.last}; }
  void begin(int64_t tile) { at = static_cast<const char*>(p.w) + (unit.row + tile * kTileRows) * stride - kLine; }

  template <int G>
  [[gnu::always_inline]] void load(int64_t, bool fetches) {
    at += kLine;
    tile_load<4>(at, stride);
    if (G == 2) tile_load<5>(at + kTileRows * stride, stride);
    if (fetches) ahead.fetch(G * kTileRows);
  }
};

// A tile of rows that do not lie evenly, copied some columns at a time, with zeros behind the width. A tile has every
// run-th row of a unit, and the next one its neighbours: 16 long runs are read side by side.
struct Copied {
  static constexpr int kBeside = 1;
  const Linear& p;
  Unit unit;
  int64_t run, step;  // from a row of a tile to the next one, and to that of the next tile
  Rows<BFloat16> all;
  const BFloat16 *from[kTileRows], *next[kTileRows];
  alignas(kLine) Words copies[2][kTileRows];  // multiplied now, and next

  Copied(const Linear& p, const Unit& unit) : Copied(p, unit, tiles_of(unit.last - unit.row, kTileRows), 1) {}
  Copied(const Linear& p, const Unit& unit, int64_t run, int64_t step)
      : p(p), unit(unit), run(run), step(step),
        all{static_cast<const BFloat16*>(p.w), p.stride, unit.last, p.index} {}

  TileOfRows rows(int64_t tile) const { return {unit.row + tile * step, run, unit.last}; }
  void begin(int64_t tile) {
    for (int64_t r = 0, row = unit.row + tile * step; r < kTileRows; r++, row += run)
      from[r] = all[row], next[r] = all[row + step];
    copy(0);
  }

  [[gnu::always_inline]] void copy(int64_t k) {
    Words* to = copies[k % 2];
    int64_t c = k * kDeepTile;
    if (c >= p.width) return;
    for (int64_t r = 0; r < kTileRows; r++) fetch_ahead(from[r], next[r], c, p.width);
    if (c + kDeepTile <= p.width)
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTileRows; r++) to[r] = stored<Words>(from[r] + c);
    else
      for (int64_t r = 0; r < kTileRows; r++) {
        to[r] = Words{};
        memcpy(&to[r], from[r] + c, (p.width - c) * sizeof(BFloat16));
      }
  }

  template <int G>
  [[gnu::always_inline]] void load(int64_t k, bool) {
    copy(k + 1);
    tile_load<4>(copies[k % 2], kLine);
  }
};

// The products of G tiles of rows, from the `group`th on, with T tiles of tokens, from `tile` on. Each is one sum from
// the first column to the last.
template <int G, int T, class Source>
void dot_tiles(const Linear& p, const TileTokens& x, int64_t tile, int64_t group, Source& source) {
  int64_t tokens = x.tokens, size = kDeepTile * tokens;
  const BFloat16 *b0 = x.at(tile), *b1 = x.at(tile + T - 1);
  source.begin(group);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t k = 0; k < x.deep; k++, b0 += size, b1 += size) {
    source.template load<G>(k, tile == 0);
    tile_load<6>(b0, tokens * 4);
    tile_dot<0, 4, 6>();
    if (G == 2) tile_dot<2, 5, 6>();
    if (T == 2) tile_load<7>(b1, tokens * 4);
    if (T == 2) tile_dot<1, 4, 7>();
    if (G == 2 && T == 2) tile_dot<3, 5, 7>();
  }
  alignas(kLine) float sums[4][kTileSize / 2];
  tile_store<0>(sums[0], tokens * 4), tile_store<1>(sums[1], tokens * 4);
  tile_store<2>(sums[2], tokens * 4), tile_store<3>(sums[3], tokens * 4);
  for (int g = 0; g < G; g++)
    for (int t = 0; t < T; t++)
      write_tile(p, source.rows(group + g), (tile + t) * kTileRows, tokens, sums[2 * g + t]);
}

// The products of up to Source::kBeside tiles of rows, from the `group`th on and before `groups`, with all tokens.
template <class Source>
void dot_group(const Linear& p, const TileTokens& x, int64_t group, int64_t groups, Source& source) {
  bool two = Source::kBeside == 2 && group + 1 < groups;
  for (int64_t tile = 0; tile < x.tiles; tile += 2) {
    if (two && tile + 1 < x.tiles) dot_tiles<Source::kBeside, 2>(p, x, tile, group, source);
    else if (two) dot_tiles<Source::kBeside, 1>(p, x, tile, group, source);
    else if (tile + 1 < x.tiles) dot_tiles<1, 2>(p, x, tile, group, source);
    else dot_tiles<1, 1>(p, x, tile, group, source);
  }
}

// The products of a unit's rows.
template <class Source>
void dot_unit(const Linear& p, const TileTokens& x, const Unit& unit) {
  Source source(p, unit);
  int64_t groups = tiles_of(unit.last - unit.row, kTileRows);
  for (int64_t group = 0; group < groups; group += Source::kBeside) dot_group(p, x, group, groups, source);
}

inline TileShapes linear_shapes(int64_t tokens) {
  TileShapes tiles;
  for (int tile : {4, 5}) tiles.set(tile, kTileRows, kLine);
  for (int tile : {0, 1, 2, 3, 6, 7}) tiles.set(tile, kTileRows, tokens * 4);
  return tiles;
}

void amx_linear(const Linear& p) {
  TileTokens x(static_cast<const BFloat16*>(p.x), p.rows, p.width);
#pragma omp parallel num_threads(p.threads)
  {
    TileShapes tiles = linear_shapes(x.tokens);
    tiles.use();
    Share share(tiles_of(p.count, kTileRows));
    Unit unit{share.begin * kTileRows, std::min(share.end * kTileRows, p.count), 0, p.width};
    if (unit.row < unit.last) InPlace::fits(p) ? dot_unit<InPlace>(p, x, unit) : dot_unit<Copied>(p, x, unit);
  }
}

#endif

}  // namespace

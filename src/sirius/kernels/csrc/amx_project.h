// Sums of rows of a bfloat16 weight, weighed by tokens, by tiles: B is 16 rows of the weight where they lie.
//
// The instruction adds the products of pairs, and a pair in a row is two neighbouring columns. So A has each token's
// weights twice: in pairs (z, 0), which add up the even columns, and (0, z), which add up the odd ones.
//
// Rows are cut into kTileParts parts, whatever the number of tokens and threads. The sums of a part run from its first row
// to its last; those of the parts are added in turn. Threads share parts and columns.

#pragma once

#include <memory>
#include <vector>

#include "amx.h"

namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kTileParts = 8, kSheet = 8;           // tiles of rows whose columns are read together
constexpr int64_t kSheetRows = kSheet * kTileRows;  // their rows
constexpr int64_t kSharing = 64;                   // tokens that share a reading of the weight

// How many rows are between two of a tile, in a sheet of `rows`. The tile after it has their neighbours, so that a
// sheet's tiles read 16 long runs side by side. A last tile has the rows that are left, one after the other.
inline int64_t apart(int64_t rows) { return std::max<int64_t>(1, rows / kTileRows); }

// The order in which rows are added: sheet by sheet, tile by tile.
inline std::vector<int64_t> tile_order(int64_t rows) {
  std::vector<int64_t> order(rows);
  for (int64_t begin = 0, place = 0; begin < rows; begin += kSheetRows) {
    int64_t count = std::min(kSheetRows, rows - begin), step = apart(count);
    for (int64_t tile = 0; tile < count / kTileRows; tile++)
      for (int64_t k = 0; k < kTileRows; k++) order[place++] = begin + tile + k * step;
    for (; place < begin + count; place++) order[place] = place;
  }
  return order;
}

// What the threads share: the order of the rows, and the sums of all parts, [parts, columns / 32, even and odd, tokens
// in whole tiles, 16]. Columns end at a whole kLine.
struct PartSums {
  int64_t rows, each, parts;         // rows in all; rows of a part
  int64_t tokens, tiles, across;     // tokens of a tile; tiles of tokens; floats of 16 columns
  int64_t size;                      // floats of a part
  std::vector<int64_t> order, index;  // places of the rows among the weights of a token, and in the weight
  std::unique_ptr<float[]> sums;

  explicit PartSums(const Project& p)
      : rows(p.count), each(tiles_of(rows, kTileParts * kSheetRows) * kSheetRows), parts(each ? tiles_of(rows, each) : 0),
        tokens(std::min(p.rows, kTileRows)), tiles(tiles_of(p.rows, kTileRows)), across(tokens * tiles * kVector),
        size(tiles_of(p.width, kLine) * kLine / kVector * across), order(tile_order(rows)), index(order),
        sums(new float[parts * size]) {
    if (p.index)
      for (int64_t& row : index) row = p.index[row];
  }

  Rows<BFloat16> of(const Project& p) const {
    return {static_cast<const BFloat16*>(p.w), p.stride, rows, index.data()};
  }
  int64_t begin(int64_t part) const { return std::min(rows, part * each); }
  float* at(int64_t row, int64_t column) const { return sums.get() + row / each * size + column / kVector * across; }
};

// Where two tiles of columns of a sheet's tiles of rows lie, in bytes.
struct Lying {
  const char* first;
  int64_t next, below, stride;  // from a tile of columns to the next one; of rows; from a row to the next one
};

// What a thread prepares of a sheet.
struct Prepared {
  std::vector<Words> weights;  // A [tiles of rows, tiles of tokens, even and odd, tokens, 16 pairs]
  std::vector<Words> copied;   // B [tiles of rows, 2 tiles of columns, 16 rows, 32 columns]

  explicit Prepared(const PartSums& all)
      : weights(kSheet * all.tiles * 2 * all.tokens), copied(kSheet * 2 * kTileRows) {}

  // The tokens' weights of rows from `row` on, before `last`; zeros behind.
  void weigh(const Project& p, const PartSums& all, int64_t row, int64_t last) {
    for (int64_t m = 0; m < p.rows; m++) {
      const auto* z = static_cast<const BFloat16*>(p.z) + m * p.count;
      Words* to = &weights[m / all.tokens * 2 * all.tokens + m % all.tokens];
      for (int64_t i = row; i < last; i += kTileRows, to += all.tiles * 2 * all.tokens) {
        uint32_t bits[kTileRows] = {};
        for (int64_t k = 0; k < std::min(kTileRows, last - i); k++) bits[k] = z[all.order[i + k]].bits;
        to[0] = stored<Words>(bits), to[all.tokens] = to[0] << 16;
      }
    }
  }

  // Two tiles of columns of rows from `row` on, before `last`: copies, with zeros behind, where tiles are not whole.
  Lying lying(const Project& p, const PartSums& all, int64_t row, int64_t last, int64_t column) {
    Rows<BFloat16> rows = all.of(p);
    int64_t width = std::min<int64_t>(kLine, p.width - column), stride = p.stride * sizeof(BFloat16);
    if (!p.index && width == kLine && (last - row) % kTileRows == 0)
      return {reinterpret_cast<const char*>(rows[row] + column), kLine, stride, apart(last - row) * stride};
    for (int64_t i = 0; i < tiles_of(last - row, kTileRows) * kTileRows; i++) {
      Words both[2] = {}, *to = &copied[i / kTileRows * 2 * kTileRows + i % kTileRows];
      if (width == kLine && row + i < last) memcpy(both, rows[row + i] + column, sizeof both);
      else if (row + i < last) memcpy(both, rows[row + i] + column, width * sizeof(BFloat16));
      to[0] = both[0], to[kTileRows] = both[1];
    }
    constexpr int64_t size = kTileRows * kLine;
    return {reinterpret_cast<const char*>(copied.data()), size, 2 * size, kLine};
  }
};

// Adds `deep` tiles of rows to the sums of a tile of tokens, of two tiles of columns.
inline void add_tiles(const PartSums& all, const Words* weights, const Lying& b, int64_t deep, bool fresh, float* sums,
                      TileAhead* ahead) {
  if (fresh) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  else {
    tile_load<0>(sums, kLine), tile_load<1>(sums + all.across, kLine);
    tile_load<2>(sums + 2 * all.across, kLine), tile_load<3>(sums + 3 * all.across, kLine);
  }
  const char* from = b.first;
  for (int64_t d = 0; d < deep; d++, from += b.below, weights += all.tiles * 2 * all.tokens) {
    tile_load<4>(weights, kLine), tile_load<5>(weights + all.tokens, kLine);
    tile_load<6>(from, b.stride), tile_load<7>(from + b.next, b.stride);
    tile_dot<0, 4, 6>(), tile_dot<1, 5, 6>(), tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
    if (ahead) ahead->fetch(2 * kTileRows);
  }
  tile_store<0>(sums, kLine), tile_store<1>(sums + all.across, kLine);
  tile_store<2>(sums + 2 * all.across, kLine), tile_store<3>(sums + 3 * all.across, kLine);
}

// Adds rows row .. last - 1, up to kSheetRows, to the sums of their part, of the columns from `column` to `end`.
inline void add_sheet(const Project& p, const PartSums& all, int64_t row, int64_t last, int64_t column, int64_t end,
                     Prepared& prepared, TileAhead* ahead) {
  prepared.weigh(p, all, row, last);
  for (; column < end; column += kLine) {
    Lying b = prepared.lying(p, all, row, last, column);
    for (int64_t tile = 0; tile < all.tiles; tile++)
      add_tiles(all, &prepared.weights[tile * 2 * all.tokens], b, tiles_of(last - row, kTileRows), row % all.each == 0,
                all.at(row, column) + tile * all.tokens * kVector, tile ? nullptr : ahead);
  }
}

// The same sums bit for bit by vectors, for one token, which then takes up to a third less time. A tile adds 16 rows up
// from zero, one after the other, before they join the sum; each sum is rounded, and denormals are zeros.
struct OneToken {
  Rows<BFloat16> rows;
  std::vector<BFloat16> zeros;  // a row that makes up for those that a last tile lacks
  std::vector<uint32_t> pairs;  // the weights of two rows, the first one in the upper half, which is added first
  std::vector<float> own;       // the sums of a tile

  OneToken(const Project& p, const PartSums& all, int64_t token)
      : rows(all.of(p)), zeros(p.width), pairs(tiles_of(p.count, kTileRows) * kTileRows / 2),
        own(tiles_of(p.width, kLine) * kLine) {
    const auto* z = static_cast<const BFloat16*>(p.z) + token * p.count;
    for (int64_t i = 0; i < p.count; i++) pairs[i / 2] |= uint32_t(z[all.order[i]].bits) << (1 - i % 2) * 16;
  }

  // Adds kFewRows rows of a tile, from place `first` on, to the tile's own sums; the last of them adds these to `sums`.
  // Columns are from `column` to `end`, in the paired order of formats.h.
  void add_few(int64_t first, int64_t column, int64_t end, float* sums) {
    const BFloat16 *from[kFewRows], *next[kFewRows];
    for (int64_t r = 0; r < kFewRows; r++) {
      from[r] = (first + r < rows.count ? rows[first + r] : zeros.data()) + column;
      next[r] = rows[first + kFewRows + r] + column;
    }
    bool begins = first % kTileRows == 0, ends = first % kTileRows == kTileRows - kFewRows;
    float* to = ends ? sums : own.data();
    auto add = [&](int64_t c, int half, auto&& loaded) __attribute__((always_inline)) {
      Floats s = begins ? Floats{} : load(own.data() + c + half * kVector);
#pragma GCC unroll 8
      for (int r = 0; r < kFewRows; r += 2) {
        Words upper = loaded(from[r] + c), lower = loaded(from[r + 1] + c);
        Words pair = half ? (upper & 0xffff0000u) | lower >> 16 : upper << 16 | (lower & 0xffffu);
        s = multiply_add(s, pair, pairs[(first + r) / 2]);
      }
      if (ends) s = flush_denormals(load(sums + c + half * kVector) + (s + 0.0f));
      store(to + c + half * kVector, s);
    };
    int64_t c = 0, size = end - column;
    for (; c + kDeepTile <= size; c += kDeepTile) {
      for (int64_t r = 0; r < kFewRows; r++) fetch_ahead(from[r], next[r], c, size);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++)
        add(c, half, [](const BFloat16* row) __attribute__((always_inline)) { return stored<Words>(row); });
    }
    for (int half = 0; half < 2 && c < size; half++)
      add(c, half, [&](const BFloat16* row) {
        Words some = {};
        memcpy(&some, row, (size - c) * sizeof(BFloat16));
        return some;
      });
  }

  // Adds the rows row .. last - 1, where a tile begins at the first.
  void add_rows(int64_t row, int64_t last, int64_t column, int64_t end, float* sums) {
    for (; row < last; row += kTileRows)
      for (int64_t few = row; few < row + kTileRows; few += kFewRows) add_few(few, column, end, sums);
  }
};

// Sums of a token again, of two halves of a tile of columns: a pair's zero times an infinite weight is no number, so
// where tiles give none, vectors tell whether there is none.
[[gnu::noinline]] void add_again(const Project& p, const PartSums& all, int64_t token, int64_t column, Floats* sums) {
  OneToken one(p, all, token);
  sums[0] = sums[1] = Floats{};
  for (int64_t part = 0; part < all.parts; part++) {
    float its[2 * kVector] = {};
    one.add_rows(all.begin(part), all.begin(part + 1), column, std::min<int64_t>(p.width, column + 2 * kVector), its);
    sums[0] += load(its), sums[1] += load(its + kVector);
  }
}

// Whether any of the numbers is none.
inline bool any_nan(Floats v) { return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q); }

// Writes what the parts of a token come to, of two halves of a tile of columns from `column` on.
inline void join_parts(const Project& p, const PartSums& all, int64_t token, int64_t column) {
  const auto* bias = static_cast<const BFloat16*>(p.bias);
  int64_t count = std::min<int64_t>(2 * kVector, p.width - column);
  Floats sums[2] = {};
  for (int odd = 0; odd < 2; odd++)
    for (int64_t part = 0; part < all.parts; part++)
      sums[odd] += load(all.at(part * all.each, column + odd * kVector) + token * kVector);
  if (p.rows > 1 && (any_nan(sums[0]) || any_nan(sums[1]))) add_again(p, all, token, column, sums);
  if (bias) {
    BFloat16 added[2 * kVector] = {};
    memcpy(added, bias + column, count * sizeof(BFloat16));
    for (int odd = 0; odd < 2; odd++) sums[odd] += load_half(added, odd);
  }
  Words narrowed = upper_rounded(sums[0]) >> 16 | (upper_rounded(sums[1]) & 0xffff0000u);
  memcpy(static_cast<BFloat16*>(p.y) + token * p.width + column, &narrowed, count * sizeof(BFloat16));
}

inline TileShapes project_shapes(int64_t tokens) {
  TileShapes tiles;
  for (int tile = 0; tile < 6; tile++) tiles.set(tile, tokens, kLine);
  for (int tile : {6, 7}) tiles.set(tile, kTileRows, kLine);
  return tiles;
}

// This thread's share of the parts and their columns; a unit is of one part.
inline std::vector<Unit> units_of(const PartSums& all, int64_t width) {
  std::vector<Unit> units;
  int64_t pieces = tiles_of(width, kLine), taken;
  Share share(all.parts * pieces);
  for (int64_t at = share.begin; at < share.end; at += taken) {
    int64_t part = at / pieces, piece = at % pieces;
    taken = std::min(pieces - piece, share.end - at);
    units.push_back({all.begin(part), all.begin(part + 1), piece * kLine, std::min(width, (piece + taken) * kLine)});
  }
  return units;
}

// What a thread adds sheets with: vectors for one token, tiles for more.
struct PartAdder {
  const Project& p;
  const PartSums& all;
  TileAhead ahead;  // of the thread's units
  Prepared prepared;
  std::vector<OneToken> one;

  PartAdder(const Project& p, const PartSums& all, const Unit* units, const Unit* end)
      : p(p), all(all), ahead({static_cast<const BFloat16*>(p.w), p.stride, p.count, p.index}, units, end),
        prepared(all) {
    if (p.rows == 1) one.emplace_back(p, all, 0);
    else if (units < end) ahead.fetch(kSheetRows * tiles_of(units->end - units->column, kDeepTile));
  }

  // Adds the sheet of a row, of the columns from `column` to `end`.
  void add(int64_t row, int64_t column, int64_t end) {
    int64_t last = std::min(all.rows, row + kSheetRows);
    if (p.rows > 1) return add_sheet(p, all, row, last, column, end, prepared, &ahead);
    float* sums = all.at(row, column);
    if (row % all.each == 0) std::fill(sums, sums + tiles_of(end - column, kLine) * kLine, 0.0f);
    one[0].add_rows(row, last, column, end, sums);
  }
};

// Up to kSharing tokens.
inline void amx_project_some(const Project& p) {
  PartSums all(p);
#pragma omp parallel num_threads(p.threads)
  {
    TileShapes tiles = project_shapes(all.tokens);
    tiles.use();
    auto units = units_of(all, p.width);
    PartAdder adder(p, all, units.data(), units.data() + units.size());
    for (const Unit& unit : units)
      for (int64_t row = unit.row; row < unit.last; row += kSheetRows) adder.add(row, unit.column, unit.end);
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (int64_t column = 0; column < p.width; column += 2 * kVector)
      for (int64_t m = 0; m < p.rows; m++) join_parts(p, all, m, column);
  }
}

void amx_project(const Project& p) {
  for (int64_t m = 0; m < p.rows; m += kSharing) {
    Project some = p;
    some.rows = std::min(kSharing, p.rows - m);
    some.z = static_cast<const BFloat16*>(p.z) + m * p.count;
    some.y = static_cast<BFloat16*>(p.y) + m * p.width;
    amx_project_some(some);
  }
}

#endif

}  // namespace

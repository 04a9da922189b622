// bfloat16 products by AMX: tiles of 16 rows of 64 bytes, and an instruction that multiplies two of them. It reads
// weights once for up to 32 tokens, and multiplies as fast for 16 tokens as for one.
//
// C += A B, where each number of C is a sum of its own: a token's result does not depend on the tokens beside it. The
// instruction takes denormals as zeros and rounds each sum to nearest, ties to even (Intel's manual, TDPBF16PS).
// GCC's own functions for tiles do not tell it that they read and write memory; those here do.

#pragma once

#include <vector>

#include "readers.h"
#include "rows.h"

namespace {

void amx_linear(const Linear&);  // defined with AMX alone, and called there alone
void amx_project(const Project&);

#if defined(__AMX_BF16__)

constexpr int64_t kTileRows = 16, kDeepTile = 32;  // rows of a tile, and bfloat16 numbers of its row
constexpr int64_t kTileSize = kTileRows * kDeepTile;

template <int C>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(C));
}

// Loads a tile whose rows are `stride` bytes apart.
template <int C>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(C) : "memory");
}

template <int C>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(C) : "memory");
}

// C += A B, pair by pair: A [rows of C, pairs], B [pairs, columns of C]
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The shapes of the eight tiles of a thread, for as long as this lives: other code of the process may use tiles too.
struct TileShapes {
  struct alignas(kLine) Shapes {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
  } shapes;

  void set(int tile, int64_t rows, int64_t bytes) { shapes.rows[tile] = rows, shapes.bytes[tile] = bytes; }
  void use() const { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  ~TileShapes() { asm volatile("tilerelease"); }
};

// Some columns of some rows, which a thread reads one after the other.
struct Unit {
  int64_t row, last, column, end;
};

// Fetches units line by line, in the order of memory where rows lie in order: memory is faster in long runs.
struct TileAhead {
  Rows<BFloat16> rows;
  const Unit *unit, *stop;
  int64_t row;  // the next one
  const BFloat16 *line = nullptr, *end = nullptr;

  TileAhead(const Rows<BFloat16>& rows, const Unit* unit, const Unit* stop)
      : rows(rows), unit(unit), stop(stop), row(unit < stop ? unit->row : 0) {
    turn();
  }

  void turn() {
    while (unit < stop && row >= unit->last)
      if (++unit < stop) row = unit->row;
    if (unit >= stop) return void(line = end = nullptr);
    line = rows[row] + unit->column, end = rows[row] + unit->end, row++;
  }

  [[gnu::always_inline]] void fetch(int64_t lines) {
    constexpr int64_t size = kLine / sizeof(BFloat16);
    if (lines * size < end - line) {
#pragma GCC unroll 32
      for (int64_t i = 0; i < lines; i++) __builtin_prefetch(line + i * size, 0, 2);
      line += lines * size;
      return;
    }
    for (; lines > 0 && line; lines--) {
      __builtin_prefetch(line, 0, 2);
      line += size;
      if (line >= end) turn();
    }
  }
};

inline int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rounds to nearest, ties to even, in the upper half.
inline Words upper_rounded(Floats v) {
  Words bits = (Words)v;
  return v != v ? Words{} + 0x7fc00000u : bits + (0x7fff + (bits >> 16 & 1));
}

#endif

// Whether products of T run on tiles.
#if defined(__AMX_BF16__)
template <class T>
constexpr bool kTiles = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr bool kTiles = false;
#endif

}  // namespace

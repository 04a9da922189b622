// The plain C interface, and the choice of the instruction set when the library is first used.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "rows.h"

namespace {

// An instruction set's kernels, and whether this machine has it.
struct Level {
  const Kernels& kernels;
  bool here;
};

// The best instruction set; where SIRIUS_ISA names one, for tests, the best from there on down.
const Kernels& best() {
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Level levels[] = {
      {kernels_avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
      {kernels_avx512, avx512},
      {kernels_avx2, avx2},
      {kernels_emulated, avx2},  // behind what it needs: taken only by name
  };
  const char* limit = getenv("SIRIUS_ISA");
  bool allowed = !limit;
  for (const Level& level : levels) {
    allowed |= limit && !strcmp(limit, level.kernels.name);
    if (allowed && level.here) return level.kernels;
  }
#endif
  return kernels_generic;
}

const Kernels& chosen() {
  static const Kernels& kernels = best();
  return kernels;
}

// The place of the first row that the weight, of `height` rows, does not have; -1 if there is none. Scanned without a
// branch: the sign of an index is set below 0, that of height - 1 - index from the height on.
int64_t first_outside(const int64_t* index, int64_t count, int64_t height) {
  if (!index) return count <= height ? -1 : height;
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; i++) signs |= uint64_t(index[i]) | (uint64_t(height) - 1 - uint64_t(index[i]));
  if (!(signs >> 63)) return -1;
  return std::find_if(index, index + count, [&](int64_t row) { return row < 0 || row >= height; }) - index;
}

int64_t size_of(int dtype) { return dtype == kFloat32 ? sizeof(float) : sizeof(uint16_t); }

// The bits of |values|, in the order of the values; those of 16-bit formats in the upper half.
std::vector<uint32_t> magnitudes(Dtype dtype, const void* values, int64_t n) {
  std::vector<uint32_t> bits(n);
  if (dtype == kFloat32) memcpy(bits.data(), values, n * sizeof(uint32_t));
  if (dtype != kFloat32)
    for (int64_t i = 0; i < n; i++) bits[i] = uint32_t(static_cast<const uint16_t*>(values)[i]) << 16;
  for (uint32_t& b : bits) b &= 0x7fffffff;
  return bits;
}

// Writes the places of the k largest of n values >= 0 to out [k], ascending; of equal ones the first.
//
// The bits of such floats are in the order of the values: a histogram of their upper bits finds the one bin in which
// the k-th largest is, and only that bin is sorted out further. NaN counts as the largest. Nothing branches on a value:
// such a branch would be guessed wrong half the time.
void largest(const std::vector<uint32_t>& bits, int64_t k, int64_t* out) {
  constexpr int kShift = 20, kBins = 1 << (31 - kShift);
  int64_t n = bits.size();
  if (!k) return;
  std::vector<int32_t> bins(2 * kBins);  // two histograms, since the same bin twice in a row would wait for itself
  for (int64_t i = 0; i < n; i++) bins[(bits[i] >> kShift) + i % 2 * kBins]++;
  int64_t bin = kBins, above = 0, held = 0;
  while (above + held < k) {
    above += held;
    bin--;
    held = bins[bin] + bins[bin + kBins];
  }
  std::vector<uint32_t> within(held + 1);
  for (int64_t i = 0, found = 0; i < n; i++) {
    within[found] = bits[i];
    found += bits[i] >> kShift == uint32_t(bin);
  }
  within.pop_back();
  int64_t wanted = k - above;  // of `within`
  std::nth_element(within.begin(), within.begin() + (wanted - 1), within.end(), std::greater<uint32_t>());
  uint32_t bar = within[wanted - 1];
  int64_t ties = wanted - std::count_if(within.begin(), within.end(), [&](uint32_t b) { return b > bar; });
  for (int64_t i = 0, found = 0; found < k; i++) {
    bool tie = (bits[i] == bar) & (ties > 0);
    out[found] = i;
    found += bits[i] > bar | tie;
    ties -= tie;
  }
}

}  // namespace

extern "C" {

const char* sirius_isa() { return chosen().name; }

// Rows of a weight [height, width] are `stride` elements apart. Products return -1, or without a product the place in
// the index of the first row that the weight does not have.
int64_t sirius_linear(int dtype, const void* x, int64_t rows, int64_t width, const void* w, int64_t stride,
                      int64_t height, int64_t count, const int64_t* index, const void* bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside < 0) chosen().linear({Dtype(dtype), x, rows, width, w, stride, count, index, bias, y, threads});
  return outside;
}

int64_t sirius_project(int dtype, const void* z, int64_t rows, int64_t count, const int64_t* index, const void* w,
                       int64_t stride, int64_t height, int64_t width, const void* bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside < 0) chosen().project({Dtype(dtype), z, rows, count, index, w, stride, width, bias, y, threads});
  return outside;
}

// act(gate(x)) * up(x) of the neurons at index; act(gate(x)) where up is null.
int64_t sirius_glu(int dtype, int kind, const void* x, int64_t rows, int64_t width, const void* gate,
                   int64_t gate_stride, const void* up, int64_t up_stride, int64_t height, int64_t count,
                   const int64_t* index, const void* gate_bias, const void* up_bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside >= 0) return outside;
  Dtype of = Dtype(dtype);
  std::unique_ptr<char[]> other(new char[up ? rows * count * size_of(dtype) : 0]);
  chosen().linear({of, x, rows, width, gate, gate_stride, count, index, gate_bias, y, threads});
  if (up) chosen().linear({of, x, rows, width, up, up_stride, count, index, up_bias, other.get(), threads});
  chosen().activate({of, ActivationKind(kind), y, up ? other.get() : nullptr, rows * count, y, threads});
  return outside;
}

// See Finish; gated is [rows, count] if by_place, else [rows, height].
int64_t sirius_finish(int dtype, const void* x, int64_t rows, int64_t width, const void* gated, int by_place,
                      const void* up, int64_t up_stride, const void* down, int64_t down_stride, int64_t height,
                      int64_t count, const int64_t* index, const void* up_bias, const void* bias, void* y,
                      int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside < 0)
    chosen().finish({Dtype(dtype), x, rows, width, gated, by_place ? count : height, by_place != 0, up, up_stride, down,
                     down_stride, count, index, up_bias, bias, y, threads});
  return outside;
}

void sirius_norm(int dtype, const void* x, int64_t rows, int64_t width, const void* weight, float eps, float offset,
                 int early, void* y, int threads) {
  chosen().norm({Dtype(dtype), x, rows, width, weight, eps, offset, early != 0, y, threads});
}

// at: the strides of query, keys and values, three each; sizes: rows, tokens, heads, kv_heads, slots, after, size
void sirius_attend(int dtype, const void* query, const void* keys, const void* values, const int64_t* at,
                   const int64_t* held, const void* seen, const int64_t* sizes, float scale, float softcap, void* y,
                   int threads) {
  const int64_t* n = sizes;
  chosen().attend({Dtype(dtype), query, keys, values, at, at + 3, at + 6, held, static_cast<const uint8_t*>(seen),
                   n[0], n[1], n[2], n[3], n[4], n[5], n[6], scale, softcap, y, threads});
}

// The places of the k largest of each row's n values, to out [rows, k].
void sirius_largest(int dtype, const void* values, int64_t rows, int64_t n, int64_t k, int64_t* out, int threads) {
  const char* of = static_cast<const char*>(values);
  int64_t bytes = n * size_of(dtype);
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (int64_t m = 0; m < rows; m++) largest(magnitudes(Dtype(dtype), of + m * bytes, n), k, out + m * k);
}

}  // extern "C"

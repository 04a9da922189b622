// The plain C interface, and the choice of the instruction set when the library is first used.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "rows.h"

namespace {

const Kernels& chosen() {
  static const Kernels& kernels = [] () -> const Kernels& {
#if defined(__x86_64__)
    const char* limit = getenv("SIRIUS_ISA");  // for tests: no more than this
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && (!limit || !strcmp(limit, "avx512"))) return kernels_avx512;
    if (avx2 && (!limit || strcmp(limit, "generic"))) return kernels_avx2;
#endif
    return kernels_generic;
  }();
  return kernels;
}

// The bits of |values|, in the order of the values; those of 16-bit formats in the upper half.
std::vector<uint32_t> magnitudes(Dtype dtype, const void* values, int64_t n) {
  std::vector<uint32_t> bits(n);
  if (dtype == kFloat32) memcpy(bits.data(), values, n * sizeof(uint32_t));
  if (dtype != kFloat32)
    for (int64_t i = 0; i < n; i++) bits[i] = uint32_t(static_cast<const uint16_t*>(values)[i]) << 16;
  for (uint32_t& b : bits) b &= 0x7fffffff;
  return bits;
}

}  // namespace

extern "C" {

const char* sirius_isa() { return chosen().name; }

void sirius_linear(int dtype, const void* x, int64_t rows, int64_t width, const void* w, int64_t count,
                   const int64_t* index, const void* bias, void* y, int threads) {
  chosen().linear({Dtype(dtype), x, rows, width, w, count, index, bias, y, threads});
}

void sirius_project(int dtype, const void* z, int64_t rows, int64_t count, const int64_t* index, const void* w,
                    int64_t width, const void* bias, void* y, int threads) {
  chosen().project({Dtype(dtype), z, rows, count, index, w, width, bias, y, threads});
}

// Writes the places of the k largest of n values >= 0 to out [k], ascending; of equal ones the first.
//
// The bits of such floats are in the order of the values: a histogram of their upper bits finds the one bin in which
// the k-th largest is, and only that bin is sorted out further. NaN counts as the largest. Nothing branches on a value:
// such a branch would be guessed wrong half the time.
void sirius_largest(int dtype, const void* values, int64_t n, int64_t k, int64_t* out) {
  constexpr int kShift = 20, kBins = 1 << (31 - kShift);
  std::vector<uint32_t> bits = magnitudes(Dtype(dtype), values, n);
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

}  // extern "C"

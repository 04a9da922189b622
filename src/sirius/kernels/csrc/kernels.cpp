// The plain C interface, and the choice of the instruction set when the library is first used.

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(SIRIUS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "rows.h"

namespace {

#if defined(SIRIUS_AMX) && defined(__linux__)
// Whether this machine has tiles of bfloat16, and lets this process use them: a process must ask Linux for them once.
bool has_tiles() {
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBFloat16Tiles = 1u << 22, kTiles = 1u << 24;
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBFloat16Tiles)) return false;
  return !syscall(SYS_arch_prctl, kAskFor, kTileData);
}
#endif

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
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const Level levels[] = {
#if defined(SIRIUS_AMX) && defined(__linux__)
      {kernels_amx, bf16 && has_tiles()},
#endif
      {kernels_avx512bf16, bf16},
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

// The kernels as they are called: products return -1, or without a product the place in the index of the first row that
// the weight does not have. Rows of a weight [height, width] are `stride` elements apart.
constexpr int64_t kFine = -1;

int64_t run_linear(int dtype, const void* x, int64_t rows, int64_t width, const void* w, int64_t stride,
                   int64_t height, int64_t count, const int64_t* index, const void* bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside < 0) chosen().linear({Dtype(dtype), x, rows, width, w, stride, count, index, bias, y, threads});
  return outside;
}

int64_t run_project(int dtype, const void* z, int64_t rows, int64_t count, const int64_t* index, const void* w,
                    int64_t stride, int64_t height, int64_t width, const void* bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside < 0) chosen().project({Dtype(dtype), z, rows, count, index, w, stride, width, bias, y, threads});
  return outside;
}

// act(gate(x)) * up(x) of the neurons at index; act(gate(x)) where up is null.
int64_t run_glu(int dtype, int kind, const void* x, int64_t rows, int64_t width, const void* gate, int64_t gate_stride,
                const void* up, int64_t up_stride, int64_t height, int64_t count, const int64_t* index,
                const void* gate_bias, const void* up_bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside >= 0) return outside;
  Dtype of = Dtype(dtype);
  std::unique_ptr<char[]> other(new char[up ? rows * count * size_of(dtype) : 0]);
  chosen().linear({of, x, rows, width, gate, gate_stride, count, index, gate_bias, y, threads});
  if (up) chosen().linear({of, x, rows, width, up, up_stride, count, index, up_bias, other.get(), threads});
  chosen().activate({of, ActivationKind(kind), y, up ? other.get() : nullptr, rows * count, y, threads});
  return kFine;
}

// See Finish; gated is [rows, count] if by_place, else [rows, height].
int64_t run_finish(int dtype, const void* x, int64_t rows, int64_t width, const void* gated, int by_place,
                   const void* up, int64_t up_stride, const void* down, int64_t down_stride, int64_t height,
                   int64_t count, const int64_t* index, const void* up_bias, const void* bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  if (outside < 0)
    chosen().finish({Dtype(dtype), x, rows, width, gated, by_place ? count : height, by_place != 0, up, up_stride, down,
                     down_stride, count, index, up_bias, bias, y, threads});
  return outside;
}

// See Each; n: rows, tokens, width, height
int64_t run_each(int dtype, int kind, const void* x, const int64_t* n, const void* gate, int64_t gate_stride,
                 const void* up, int64_t up_stride, const void* down, int64_t down_stride, const int64_t* index,
                 const int64_t* counts, const void* gate_bias, const void* up_bias, const void* bias, void* y,
                 int threads) {
  int64_t outside = first_outside(index, std::accumulate(counts, counts + n[0], int64_t(0)), n[3]);
  if (outside < 0)
    chosen().each({Dtype(dtype), ActivationKind(kind), x, n[0], n[1], n[2], gate, gate_stride, up, up_stride, down,
                   down_stride, n[3], index, counts, gate_bias, up_bias, bias, y, threads});
  return outside;
}

int64_t run_norm(int dtype, const void* x, int64_t rows, int64_t width, const void* weight, float eps, float offset,
                 int early, void* y, int threads) {
  chosen().norm({Dtype(dtype), x, rows, width, weight, eps, offset, early != 0, y, threads});
  return kFine;
}

// at: the strides of x, cos, sin and y, three each; n: rows, heads, tokens, size
int64_t run_rotate(int dtype, const void* x, const void* cos, const void* sin, const int64_t* at, const int64_t* n,
                   void* y, int threads) {
  chosen().rotate({Dtype(dtype), x, cos, sin, at, at + 3, at + 6, at + 9, n[0], n[1], n[2], n[3], y, threads});
  return kFine;
}

int64_t run_add(int dtype, const void* a, const void* b, int64_t count, void* y, int threads) {
  chosen().add({Dtype(dtype), a, b, count, y, threads});
  return kFine;
}

// store[rows[b][t]][slots[b][t]] = values[b][t], `heads` times `size` numbers each; returns the first place that the
// store, of height x width such, does not have. Places below 0 count from the end.
// at: the strides of store (a row, a slot), rows and slots (b, t), values (b, t, a head); n: b, t, heads, size, height,
// width
int64_t run_put(int dtype, void* store, const int64_t* rows, const int64_t* slots, const void* values,
                const int64_t* at, const int64_t* n, int) {
  int64_t unit = size_of(dtype), size = n[3] * unit;
  for (int64_t i = 0; i < n[0] * n[1]; i++) {
    int64_t b = i / n[1], t = i % n[1], row = rows[b * at[2] + t * at[3]], slot = slots[b * at[4] + t * at[5]];
    if (row < 0) row += n[4];
    if (slot < 0) slot += n[5];
    if (row < 0 || row >= n[4] || slot < 0 || slot >= n[5]) return i;
    char* to = static_cast<char*>(store) + (row * at[0] + slot * at[1]) * unit;
    const char* from = static_cast<const char*>(values) + (b * at[6] + t * at[7]) * unit;
    for (int64_t h = 0; h < n[2]; h++) memcpy(to + h * size, from + h * at[8] * unit, size);
  }
  return kFine;
}

// at: the strides of query, keys and values, three each; n: rows, tokens, heads, kv_heads, slots, after, size
int64_t run_attend(int dtype, const void* query, const void* keys, const void* values, const int64_t* at,
                   const int64_t* held, const uint8_t* seen, const int64_t* n, float scale, float softcap, void* y,
                   int threads) {
  chosen().attend({Dtype(dtype), query, keys, values, at, at + 3, at + 6, held, seen, n[0], n[1], n[2],
                   n[3], n[4], n[5], n[6], scale, softcap, y, threads});
  return kFine;
}

// The places of the k largest of each row's n values, to out [rows, k].
int64_t run_largest(int dtype, const void* values, int64_t rows, int64_t n, int64_t k, int64_t* out, int threads) {
  const char* of = static_cast<const char*>(values);
  int64_t bytes = n * size_of(dtype);
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (int64_t m = 0; m < rows; m++) largest(magnitudes(Dtype(dtype), of + m * bytes, n), k, out + m * k);
  return kFine;
}

// Bytes and 32-bit words are told from other arguments by these types.
const uint8_t* bytes(const std::byte* of) { return reinterpret_cast<const uint8_t*>(of); }
uint8_t* bytes(std::byte* of) { return reinterpret_cast<uint8_t*>(of); }

int64_t run_quantize(int dtype, const void* w, int64_t rows, int64_t width, int64_t stride, int bits, std::byte* codes,
                     std::byte* scales, int32_t* base, int threads) {
  chosen().quantize({Dtype(dtype), w, rows, width, stride, bits, bytes(codes), bytes(scales), base, threads});
  return kFine;
}

int64_t run_quantized_linear(int dtype, const void* x, int64_t rows, int64_t width, int bits, const std::byte* codes,
                             const std::byte* scales, const int32_t* base, int64_t height, int64_t count,
                             const int64_t* index, const void* bias, void* y, int threads) {
  int64_t outside = first_outside(index, count, height);
  QuantizedWeight weight{bytes(codes), bytes(scales), base, height, bias};
  if (outside < 0)
    chosen().quantized({Dtype(dtype), kSilu, x, rows, width, bits, weight, {}, count, index, y, threads});
  return outside;
}

int64_t run_quantized_glu(int dtype, int kind, const void* x, int64_t rows, int64_t width, int bits,
                          const std::byte* gate, const std::byte* gate_scales, const int32_t* gate_base,
                          const std::byte* up, const std::byte* up_scales, const int32_t* up_base, int64_t height,
                          int64_t count, const int64_t* index, const void* gate_bias, const void* up_bias, void* y,
                          int threads) {
  int64_t outside = first_outside(index, count, height);
  QuantizedWeight first{bytes(gate), bytes(gate_scales), gate_base, height, gate_bias};
  QuantizedWeight second{bytes(up), bytes(up_scales), up_base, height, up_bias};
  if (outside < 0)
    chosen().quantized({Dtype(dtype), ActivationKind(kind), x, rows, width, bits, first, second, count, index, y,
                        threads});
  return outside;
}

int64_t run_highest(int dtype, const void* values, int64_t rows, int64_t width, int64_t count, int64_t* out,
                    int threads) {
  chosen().highest({Dtype(dtype), values, rows, width, count, out, threads});
  return kFine;
}

// A call is the number of a kernel and its arguments, in kSlots slots.
union Slot {
  int64_t number;
  double real;
  void* address;
};
constexpr int kSlots = 20;

// What Python must give for an argument of type A, as a letter; SLOT_OF in launch.py has the same letters.
//   i  a whole number
//   f  a real number
//   p  the address of numbers of the call's dtype
//   n  the address of 64-bit whole numbers
//   b  the address of bytes that are 0 or 1
//   c  the address of bytes
//   w  the address of 32-bit words
template <class A>
constexpr char kind_of() {
  if constexpr (std::is_integral_v<A>) return 'i';
  if constexpr (std::is_floating_point_v<A>) return 'f';
  if constexpr (std::is_pointer_v<A>) {
    using Element = std::remove_const_t<std::remove_pointer_t<A>>;
    if constexpr (std::is_void_v<Element>) return 'p';
    if constexpr (std::is_same_v<Element, int64_t>) return 'n';
    if constexpr (std::is_same_v<Element, uint8_t>) return 'b';
    if constexpr (std::is_same_v<Element, std::byte>) return 'c';
    if constexpr (std::is_same_v<Element, int32_t>) return 'w';
  }
}

template <class A>
A taken(const Slot& slot) {
  if constexpr (std::is_pointer_v<A>) return static_cast<A>(slot.address);
  else if constexpr (std::is_floating_point_v<A>) return A(slot.real);
  else return A(slot.number);
}

// What the signature of a kernel says: the kinds of its arguments, and how it is called with the slots of a call.
template <auto kernel>
struct Called;

template <class... A, int64_t (*kernel)(A...)>
struct Called<kernel> {
  static_assert(sizeof...(A) < kSlots);
  static constexpr char kinds[] = {kind_of<A>()..., '\0'};

  static int64_t call(const Slot* given) { return call(given, std::index_sequence_for<A...>{}); }

  template <size_t... I>
  static int64_t call(const Slot* given, std::index_sequence<I...>) {
    return kernel(taken<A>(given[I])...);
  }
};

struct Entry {
  const char *name, *kinds;
  int64_t (*call)(const Slot*);
};

#define ENTRY(name) Entry{#name, Called<run_##name>::kinds, Called<run_##name>::call}

// All that Python can call; the number of a kernel is its place here.
constexpr Entry kTable[] = {
    ENTRY(linear),
    ENTRY(project),
    ENTRY(glu),
    ENTRY(finish),
    ENTRY(norm),
    ENTRY(rotate),
    ENTRY(add),
    ENTRY(put),
    ENTRY(attend),
    ENTRY(largest),
    ENTRY(each),
    ENTRY(quantize),
    ENTRY(quantized_linear),
    ENTRY(quantized_glu),
    ENTRY(highest),
};
constexpr int64_t kKernels = std::size(kTable);

int64_t run(int64_t kernel, const Slot* given) {
  if (kernel < 0 || kernel >= kKernels) abort();
  return kTable[kernel].call(given);
}

}  // namespace

extern "C" {

const char* sirius_isa() { return chosen().name; }

int64_t sirius_slots() { return kSlots; }

// The table: a line for each kernel, in order, with its name and the kinds of its arguments.
const char* sirius_kernels() {
  static const std::string lines = [] {
    std::string all;
    for (const Entry& entry : kTable) all += std::string(entry.name) + " " + entry.kinds + "\n";
    return all;
  }();
  return lines.c_str();
}

// Runs `count` calls one after the other. Returns -1, or the number of the first whose kernel found something outside
// of what there is, with what it returned in `outside`; those after it are not run.
int64_t sirius_run(const Slot* calls, int64_t count, int64_t* outside) {
  for (int64_t i = 0; i < count; i++, calls += kSlots)
    if ((*outside = run(calls->number, calls + 1)) != kFine) return i;
  return -1;
}

}  // extern "C"

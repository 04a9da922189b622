// The places of the largest values of long rows.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "quantized.h"

namespace {

constexpr int64_t kStrip = 16 * kVector;  // values that are compared with the bar at a time

// Bits whose upper ones are those of values, in vectors; of 16-bit formats the lower half is 0.
inline Integers bits_of(const float* p) { return stored<Integers>(p); }

template <class Half>
inline Integers bits_of(const Half* p) {
  return (Integers)(__builtin_convertvector(stored<Halves>(p), Words) << 16);
}

// Integers in the order of the values: those below 0 have their magnitude's bits turned. NaN is above infinity, or
// below minus infinity, by its sign.
inline Integers ordered(Integers bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

template <class T>
inline int32_t ordered_one(const T* p) {
  int32_t bits = 0;
  memcpy(reinterpret_cast<char*>(&bits) + sizeof bits - sizeof(T), p, sizeof(T));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// Whether any of `count` values, whole vectors of them, is above the bar.
template <class T>
[[gnu::always_inline]] inline bool reaches(const T* values, int64_t count, int32_t bar) {
  Integers most = ordered(bits_of(values));
  for (int64_t i = kVector; i < count; i += kVector) {
    Integers next = ordered(bits_of(values + i));
    most = next > most ? next : most;
  }
  most = most > bar;
#if defined(__AVX512F__) && SIRIUS_WIDTH == 16
  return _mm512_test_epi32_mask((__m512i)most, (__m512i)most);
#elif defined(__AVX2__) && SIRIUS_WIDTH == 8
  return _mm256_movemask_epi8((__m256i)most);
#else
  int32_t any = 0;
  for (int i = 0; i < kVector; i++) any |= most[i];
  return any;
#endif
}

// The largest so far, the least of them first; of equal ones the first of a row stay.
using Found = std::vector<std::pair<int32_t, int64_t>>;

inline bool is_above(const Found::value_type& a, const Found::value_type& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

template <class T>
void highest_row(const T* values, int64_t n, int64_t count, int64_t* out) {
  Found found;
  found.reserve(count);
  int64_t i = 0;
  for (; i < count; i++) found.push_back({ordered_one(values + i), i});
  std::make_heap(found.begin(), found.end(), is_above);
  auto take = [&](int64_t end) {
    for (; i < end; i++)
      if (int32_t value = ordered_one(values + i); value > found[0].first) {
        std::pop_heap(found.begin(), found.end(), is_above);
        found.back() = {value, i};
        std::push_heap(found.begin(), found.end(), is_above);
      }
  };
  for (; i + kStrip <= n;) {
    if (!reaches(values + i, kStrip, found[0].first)) {
      i += kStrip;
      continue;
    }
    for (int64_t end = i + kStrip; i < end;)
      if (reaches(values + i, kVector, found[0].first))
        take(i + kVector);
      else
        i += kVector;
  }
  take(n);
  for (int64_t k = 0; k < count; k++) out[k] = found[k].second;
}

template <class T>
void highest_of(const Highest& p) {
  if (!p.count) return;
#pragma omp parallel for num_threads(p.threads) if (p.rows > 1)
  for (int64_t m = 0; m < p.rows; m++)
    highest_row(static_cast<const T*>(p.values) + m * p.width, p.width, p.count, p.out + m * p.count);
}

}  // namespace

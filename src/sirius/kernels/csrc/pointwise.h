// What is computed element by element: what gated neurons send on, norms, rotary positions, sums.

#pragma once

#include <cmath>
#include <limits>

#include "formats.h"
#include "rows.h"

namespace {

constexpr int64_t kMany = 1 << 14;  // elements that are worth a second thread

// e^x to within two units in the last place: 0 below the least normal number, infinity near the largest.
inline Floats exp_of(Floats x) {
  constexpr float kRound = 0x1.8p23f;  // a sum with it is a whole number, found in its lowest bits
  Floats sum = x * 0x1.715476p0f + kRound, whole = sum - kRound;
  Floats r = x - whole * 0x1.62e4p-1f;  // ln 2 in two parts; products with the first are exact
  r -= whole * 0x1.7f7d1cp-20f;
  Floats power = Floats{} + 1.0f / 5040;
  for (float next : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) power = power * r + next;
  Words exponent = ((Words)sum - (Words)(Floats{} + kRound) + 127) << 23;
  Floats normal = x < -87.3f ? Floats{} : power * (Floats)exponent;
  return x > 88.3f ? Floats{} + std::numeric_limits<float>::infinity() : normal;
}

inline Floats tanh_of(Floats x) {
  Floats size = x < 0 ? -x : x, small = exp_of(size * -2.0f), tanh = (1.0f - small) / (1.0f + small);
  return x < 0 ? -tanh : tanh;
}

inline Floats activated(ActivationKind kind, Floats x) {
  switch (kind) {
    case kSilu: return x / (1.0f + exp_of(-x));
    case kGeluTanh: return x / (1.0f + exp_of(x * (x * x * 0.044715f + 1.0f) * -1.5957691216f));  // 2 sqrt(2 / pi)
    case kRelu: return x < 0 ? Floats{} : x;
  }
  return x;
}

// A vector of numbers as a tensor of T would keep them.
template <class T>
inline Floats rounded(Floats x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T kept[kVector];
  store_narrow(x, kept);
  return load(kept);
}

template <class T>
inline void store_some(Floats x, int64_t count, T* to) {
  if (count == kVector) return store_narrow(x, to);
  for (int64_t i = 0; i < count; i++) narrow(x[i], to + i);
}

// Calls a function with each vector's place and its number of elements.
template <class Function>
void each_vector(int64_t count, Function function) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) function(i, kVector);
  if (i < count) function(i, count - i);
}

template <class T>
inline Floats load_some(const T* p, int64_t count) {
  return count == kVector ? load(p) : load_part(p, count);
}

// y = act(gate) * up, of `count` elements; act(gate) where up is null.
template <class T>
void activate_some(ActivationKind kind, const T* gate, const T* up, int64_t count, T* y) {
  each_vector(count, [&](int64_t i, int64_t n) {
    Floats z = rounded<T>(activated(kind, load_some(gate + i, n)));
    store_some(up ? z * load_some(up + i, n) : z, n, y + i);
  });
}

template <class T>
void activate_of(const Activate& p) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* y = static_cast<T*>(p.y);
  int64_t stretches = (p.count + kMany - 1) / kMany;
#pragma omp parallel for num_threads(p.threads) if (stretches > 1)
  for (int64_t s = 0; s < stretches; s++) {
    int64_t at = s * kMany;
    activate_some(p.kind, gate + at, up ? up + at : nullptr, std::min(kMany, p.count - at), y + at);
  }
}

template <class T>
void weigh_of(const Weigh& p) {
#pragma omp parallel for num_threads(p.threads) if (p.rows * p.count > kMany)
  for (int64_t m = 0; m < p.rows; m++) {
    const T* gated = static_cast<const T*>(p.gated) + m * p.size;
    T* y = static_cast<T*>(p.y) + m * p.count;
    for (int64_t i = 0; i < p.count; i++) narrow(widen(gated[p.index ? p.index[i] : i]) * widen(y[i]), y + i);
  }
}

template <class T>
void norm_of(const Norm& p) {
  const T* weight = static_cast<const T*>(p.weight);
#pragma omp parallel for num_threads(p.threads) if (p.rows * p.width > kMany)
  for (int64_t m = 0; m < p.rows; m++) {
    const T* x = static_cast<const T*>(p.x) + m * p.width;
    T* y = static_cast<T*>(p.y) + m * p.width;
    Floats squares = {};
    each_vector(p.width, [&](int64_t i, int64_t count) {
      Floats v = load_some(x + i, count);
      squares += v * v;
    });
    float scale = 1 / std::sqrt(sum(squares) / float(p.width) + p.eps);
    each_vector(p.width, [&](int64_t i, int64_t count) {
      Floats v = load_some(x + i, count) * scale;
      if (p.early) v = rounded<T>(v);
      store_some(v * (load_some(weight + i, count) + p.offset), count, y + i);
    });
  }
}

template <class T>
void rotate_of(const Rotate& p) {
  int64_t half = p.size / 2, lines = p.rows * p.heads * p.tokens;
#pragma omp parallel for num_threads(p.threads) if (lines * p.size > kMany)
  for (int64_t line = 0; line < lines; line++) {
    int64_t t = line % p.tokens, h = line / p.tokens % p.heads, b = line / p.tokens / p.heads;
    auto place = [&](const int64_t* at) { return b * at[0] + h * at[1] + t * at[2]; };
    const T* x = static_cast<const T*>(p.x) + place(p.x_at);
    const T* cos = static_cast<const T*>(p.cos) + place(p.cos_at);
    const T* sin = static_cast<const T*>(p.sin) + place(p.sin_at);
    T* y = static_cast<T*>(p.y) + place(p.y_at);
    each_vector(half, [&](int64_t i, int64_t count) {
      int64_t j = half + i;
      Floats first = load_some(x + i, count), second = load_some(x + j, count);
      auto turned = [&](Floats own, Floats other, int64_t at) {
        store_some(rounded<T>(own * load_some(cos + at, count)) + rounded<T>(other * load_some(sin + at, count)), count,
                   y + at);
      };
      turned(first, -second, i);
      turned(second, first, j);
    });
  }
}

template <class T>
void add_of(const Add& p) {
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  T* y = static_cast<T*>(p.y);
  int64_t stretches = (p.count + kMany - 1) / kMany;
#pragma omp parallel for num_threads(p.threads) if (stretches > 1)
  for (int64_t s = 0; s < stretches; s++)
    each_vector(std::min(kMany, p.count - s * kMany), [&](int64_t i, int64_t count) {
      int64_t at = s * kMany + i;
      store_some(load_some(a + at, count) + load_some(b + at, count), count, y + at);
    });
}

}  // namespace

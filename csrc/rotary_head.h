// One head of q or k: its pairs turned, and the head normalised before or after, forward and backward.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "floats.h"
#include "rotation.h"
#include "vector.h"

namespace megactx {

enum class Work { turn, normalise, normalise_backward };

using Words32 [[gnu::vector_size(4 * kLanes)]] = uint32_t;
using Words64 [[gnu::vector_size(8 * kLanes)]] = uint64_t;

// What a token does to its heads: rows of one value per pair, padded to whole vectors.
template <class T>
struct Rotation {
  T *cosines, *sines, *damping;
  const T* weights;  // of the channels in the norm: the damping where the norm comes after it
  T eps;
};

// The pairs of a head in memory: (j, j + D/2), or (2j, 2j + 1) where interleaved.
template <class Stored>
struct Members {
  Stored *a, *b;
  int64_t step;

  MEGACTX_INLINE Members(Stored* x, int64_t channel, int64_t pairs, bool interleaved)
      : a(x), b(x + channel * (interleaved ? 1 : pairs)), step(channel * (interleaved ? 2 : 1)) {}
  MEGACTX_INLINE bool dense() const { return step == 1; }
  MEGACTX_INLINE bool dense_interleaved() const { return step == 2 && b == a + 1; }
};

// kLanes pairs (a, b) to and from two arrays. Of floats a pair is a word of 64 bits, whose halves every instruction set
// can separate; loops over every other float do not vectorise.
template <class T>
MEGACTX_INLINE void deinterleave(const T* pairs, T* a, T* b) {
  if constexpr (sizeof(T) == 4) {
    Words64 words;
    std::memcpy(&words, pairs, sizeof(words));
    const auto low = __builtin_convertvector(words, Words32), high = __builtin_convertvector(words >> 32, Words32);
    std::memcpy(a, &low, sizeof(low));
    std::memcpy(b, &high, sizeof(high));
  } else {
    for (int i = 0; i < kLanes; ++i) a[i] = pairs[2 * i], b[i] = pairs[2 * i + 1];
  }
}
template <class T>
MEGACTX_INLINE void interleave(const T* a, const T* b, T* pairs) {
  if constexpr (sizeof(T) == 4) {
    Words32 low, high;
    std::memcpy(&low, a, sizeof(low));
    std::memcpy(&high, b, sizeof(high));
    const Words64 words = __builtin_convertvector(low, Words64) | __builtin_convertvector(high, Words64) << 32;
    std::memcpy(pairs, &words, sizeof(words));
  } else {
    for (int i = 0; i < kLanes; ++i) pairs[2 * i] = a[i], pairs[2 * i + 1] = b[i];
  }
}

// The lanes of kPairs pairs from pair j on. What has words of two channels is read by words.
template <class Format, bool kInterleaved, int kPairs, class T, class Stored>
MEGACTX_INLINE void load_block(const Members<const Stored>& x, int64_t j, T* a, T* b) {
  if constexpr (sizeof(Stored) == 2 && !kInterleaved) {
    constexpr int kWords = kPairs / 2;
    uint32_t words[kWords], more[kWords];
    std::memcpy(words, x.a + j, sizeof(words));
    std::memcpy(more, x.b + j, sizeof(more));
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kWords; ++i) a[i] = Format::low(words[i]);
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kWords; ++i) a[kWords + i] = Format::high(words[i]);
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kWords; ++i) b[i] = Format::low(more[i]);
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kWords; ++i) b[kWords + i] = Format::high(more[i]);
  } else if constexpr (sizeof(Stored) == 2) {
    uint32_t words[kPairs];
    std::memcpy(words, x.a + 2 * j, sizeof(words));
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kPairs; ++i) a[i] = Format::low(words[i]);
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kPairs; ++i) b[i] = Format::high(words[i]);
  } else if constexpr (kInterleaved) {
    deinterleave(x.a + 2 * j, a, b);
  } else {
    std::memcpy(a, x.a + j, kPairs * sizeof(T));
    std::memcpy(b, x.b + j, kPairs * sizeof(T));
  }
}
template <class Format, bool kInterleaved, int kPairs, class T, class Stored>
MEGACTX_INLINE void store_block(const T* a, const T* b, const Members<Stored>& y, int64_t j) {
  if constexpr (sizeof(Stored) == 2 && !kInterleaved) {
    constexpr int kWords = kPairs / 2;
    uint32_t words[kWords], more[kWords];
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kWords; ++i) words[i] = Format::pack(a[i], a[kWords + i]);
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kWords; ++i) more[i] = Format::pack(b[i], b[kWords + i]);
    std::memcpy(y.a + j, words, sizeof(words));
    std::memcpy(y.b + j, more, sizeof(more));
  } else if constexpr (sizeof(Stored) == 2) {
    uint32_t words[kPairs];
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kPairs; ++i) words[i] = Format::pack(a[i], b[i]);
    std::memcpy(y.a + 2 * j, words, sizeof(words));
  } else if constexpr (kInterleaved) {
    interleave(a, b, y.a + 2 * j);
  } else {
    std::memcpy(y.a + j, a, kPairs * sizeof(T));
    std::memcpy(y.b + j, b, kPairs * sizeof(T));
  }
}

// f(whether interleaved, kPairs, first pair) over the blocks of a head; returns how many pairs those are.
template <class Format, class F>
MEGACTX_INLINE int64_t for_each_block(int64_t pairs, bool dense, bool dense_interleaved, const F& f) {
  using Lanes = std::integral_constant<int, kLanes>;
  int64_t j = 0;
  if (dense) {
    if constexpr (sizeof(typename Format::Stored) == 2) {
      for (; j + kBlock <= pairs; j += kBlock) f(std::false_type(), std::integral_constant<int, kBlock>(), j);
    }
    for (; j + kLanes <= pairs; j += kLanes) f(std::false_type(), Lanes(), j);
  } else if (dense_interleaved) {
    for (; j + kLanes <= pairs; j += kLanes) f(std::true_type(), Lanes(), j);
  }
  return j;
}

template <int kCount = kLanes, class T>
MEGACTX_INLINE void turn_lanes(T* __restrict a, T* __restrict b, const T* __restrict cosines,
                               const T* __restrict sines) {
  MEGACTX_VECTOR_LOOP
  for (int i = 0; i < kCount; ++i) {
    const T x = a[i], y = b[i];
    a[i] = x * cosines[i] - y * sines[i];
    b[i] = y * cosines[i] + x * sines[i];
  }
}

// What whole blocks leave over, and heads whose channels are apart in memory: the lanes of `first` and later pairs, and
// zeros up to a whole vector. Not inlined, since one copy of slow code serves all the clones.
template <class Format, class T, class Stored>
__attribute__((noinline)) void load_rest(const Members<const Stored>& x, int64_t first, int64_t pairs, bool even_first,
                                         T* a, T* b) {
  for (int64_t j = first; j < pairs; ++j) {
    const int64_t lane = lane_of(j, pairs, even_first);
    a[lane] = Format::widen(x.a[x.step * j]);
    b[lane] = Format::widen(x.b[x.step * j]);
  }
  for (int64_t lane = pairs; lane % kLanes != 0; ++lane) a[lane] = b[lane] = 0;
}
template <class Format, class T, class Stored>
__attribute__((noinline)) void store_rest(const T* a, const T* b, int64_t first, int64_t pairs, bool even_first,
                                          const Members<Stored>& y) {
  for (int64_t j = first; j < pairs; ++j) {
    const int64_t lane = lane_of(j, pairs, even_first);
    y.a[y.step * j] = Format::narrow(a[lane]);
    y.b[y.step * j] = Format::narrow(b[lane]);
  }
}

// A head as two rows of lanes, for what takes more than one pass.
template <class Format, class T, class Stored>
MEGACTX_INLINE void load_rows(const Members<const Stored>& x, int64_t pairs, bool even_first, T* a, T* b) {
  const auto load = [&](auto interleaved, auto n, int64_t j) __attribute__((always_inline)) {
    load_block<Format, interleaved(), n()>(x, j, a + j, b + j);
  };
  const int64_t done = for_each_block<Format>(pairs, x.dense(), x.dense_interleaved(), load);
  if (done < pairs) load_rest<Format>(x, done, pairs, even_first, a, b);
}
template <class Format, class T, class Stored>
MEGACTX_INLINE void store_rows(const T* a, const T* b, int64_t pairs, bool even_first, const Members<Stored>& y) {
  const auto store = [&](auto interleaved, auto n, int64_t j) __attribute__((always_inline)) {
    store_block<Format, interleaved(), n()>(a + j, b + j, y, j);
  };
  const int64_t done = for_each_block<Format>(pairs, y.dense(), y.dense_interleaved(), store);
  if (done < pairs) store_rest<Format>(a, b, done, pairs, even_first, y);
}

// A head in one pass, in registers, and by way of the rows a and b where that does not go. A block is read before it is
// written, since x and y may be the same memory.
template <class Format, class T, class Stored>
MEGACTX_INLINE void turn_head(const Members<const Stored>& x, const Members<Stored>& y, int64_t pairs, bool even_first,
                              const Rotation<T>& r, T* row_a, T* row_b) {
  const auto turn = [&](auto interleaved, auto n, int64_t j) __attribute__((always_inline)) {
    T a[n()], b[n()];
    load_block<Format, interleaved(), n()>(x, j, a, b);
    // By what was written at once: a load of two halves would wait for both to reach the cache.
    constexpr int kCount = sizeof(Stored) == 2 && !interleaved() ? n() / 2 : n();
    for (int i = 0; i < n(); i += kCount) turn_lanes<kCount>(a + i, b + i, r.cosines + j + i, r.sines + j + i);
    store_block<Format, interleaved(), n()>(a, b, y, j);
  };
  const bool dense = x.dense() && y.dense(), dense_interleaved = x.dense_interleaved() && y.dense_interleaved();
  const int64_t done = for_each_block<Format>(pairs, dense, dense_interleaved, turn);
  if (done == pairs) return;
  load_rest<Format>(x, done, pairs, even_first, row_a, row_b);
  for (int64_t j = done; j < pairs; j += kLanes) turn_lanes(row_a + j, row_b + j, r.cosines + j, r.sines + j);
  store_rest<Format>(row_a, row_b, done, pairs, even_first, y);
}

template <class T>
MEGACTX_INLINE T sum(const T* v) {
  static_assert(kLanes == 8);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// 1 / sqrt(mean of the squares + eps) of a head, weighted; what is past its last pair is zero.
template <class T>
MEGACTX_INLINE T norm_scale(const T* __restrict a, const T* __restrict b, int64_t pairs, const Rotation<T>& r) {
  T squares[kLanes] = {};
  for (int64_t j = 0; j < pairs; j += kLanes) {
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) {
      const T x = a[j + i] * r.weights[j + i], y = b[j + i] * r.weights[j + i];
      squares[i] += x * x + y * y;
    }
  }
  return 1 / std::sqrt(sum(squares) / (2 * pairs) + r.eps);
}

template <class T>
MEGACTX_INLINE void normalise(T* __restrict a, T* __restrict b, int64_t pairs, const Rotation<T>& r) {
  const T scale = norm_scale(a, b, pairs, r);
  for (int64_t j = 0; j < pairs; j += kLanes) {
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) a[j + i] *= scale, b[j + i] *= scale;
    turn_lanes(a + j, b + j, r.cosines + j, r.sines + j);
  }
}

// g . (x, y) scale for a large gradient of a large head, whose product overflows before it is scaled.
template <class T>
__attribute__((noinline)) T scaled_product(const T* a, const T* b, const T* x, const T* y, int64_t pairs, T scale) {
  T products[kLanes] = {};
  for (int64_t j = 0; j < pairs; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) products[i] += a[j + i] * (x[j + i] * scale) + b[j + i] * (y[j + i] * scale);
  }
  return sum(products);
}

// From the gradient of the result (a, b) to that of the head (x, y), with n = w scale (x, y) the normalised head, w its
// weights and g the gradient turned back: scale (g - w n mean(g . (x, y) scale)). For a norm after the rotation R,
// w = |R| makes this R^T (scale (grad - n' mean(grad . n'))) with n' = R (x, y) scale, since R^T R = w^2.
template <class T>
MEGACTX_INLINE void normalise_backward(T* __restrict a, T* __restrict b, const T* __restrict x, const T* __restrict y,
                                       int64_t pairs, const Rotation<T>& r) {
  const T scale = norm_scale(x, y, pairs, r);
  T products[kLanes] = {};
  for (int64_t j = 0; j < pairs; j += kLanes) {
    turn_lanes(a + j, b + j, r.cosines + j, r.sines + j);
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) products[i] += a[j + i] * x[j + i] + b[j + i] * y[j + i];
  }
  T along = sum(products) * scale / (2 * pairs);
  if (!std::isfinite(along)) along = scaled_product(a, b, x, y, pairs, scale) / (2 * pairs);
  for (int64_t j = 0; j < pairs; j += kLanes) {
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) {
      const T w = r.weights[j + i];
      a[j + i] = (a[j + i] - x[j + i] * w * scale * (w * along)) * scale;
      b[j + i] = (b[j + i] - y[j + i] * w * scale * (w * along)) * scale;
    }
  }
}

}  // namespace megactx

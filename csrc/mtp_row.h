// One context of one row: log-probabilities of K targets and the gradient of the logits, for one logsumexp.
//
// Let m be the largest logit, at j, and r the sum of exp(z_v - m) over all v but j. Then
//     log p_j = -log1p(r),    log p_v = z_v - m - log1p(r),    1 - p_j = r / (1 + r),
// which keep their digits where p_j is close to 1 and 1 - p_j would be rounding errors.
//
// The symbols go through in chunks that stay in the first-level cache, three times: for m, for the exponentials and r,
// for the gradient. Memory sees the row once, if it fits the second-level cache. Sums run over 32 lanes and then, in
// double, over chunks: an order that depends on the size of the vocabulary alone.
//
// A logit of -inf is a symbol that cannot be. A row with a NaN, with +inf or without a symbol above -inf gives NaN in
// this context, as PyTorch's log_softmax does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "floats.h"
#include "vector.h"

namespace megactx::mtp {

constexpr int64_t kChunk = 1024;
constexpr int kLanes = 32;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// The logits of one context in one row, or where their gradient goes.
template <class Stored>
struct Symbols {
  Stored* data;
  int64_t stride;

  Stored& operator[](int64_t v) const { return data[v * stride]; }
};

struct Options {
  double softcap;  // 0: none
  double smoothing, z_loss;
  bool mean;  // whether the mean of log p over the vocabulary is wanted
};

struct Target {
  int64_t id;     // in the vocabulary, or kIgnored or kBad
  double weight;  // in the loss, times the gradient that arrives
  double logit;
};
constexpr int64_t kIgnored = -1, kBad = -2;

template <class T>
struct Scratch {
  std::vector<Target> targets;
  std::vector<T> exponentials, slopes;
  std::vector<T> special;  // the gradient at the targets and at the largest logit

  static Scratch& local() {
    thread_local Scratch scratch;
    return scratch;
  }
};

// What log p and p are made of: lse = top + log_total.
struct Sums {
  double top = 0.0;
  int64_t argmax = 0;
  double rest = 0.0;       // exp(z - top) over all symbols but argmax
  double log_total = 0.0;  // log(1 + rest)
  double distance = 0.0;   // z - top over all symbols
};

MEGACTX_INLINE float exponential(float x) { return exp_nonpositive(x); }
MEGACTX_INLINE double exponential(double x) { return std::exp(x); }

// c tanh(x / c), and its derivative, which 1 - tanh^2 would round to nothing where it is small.
template <class T>
struct Capped {
  T value, slope;
};
MEGACTX_INLINE Capped<float> soft_cap(float x, float cap) {
  const float u = x / cap;
  const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(u) & 0x7fffffff);
  const float w = exp_nonpositive(-2.0f * magnitude), inverse = 1.0f / (1.0f + w);
  const float far = 1.0f - 2.0f * w * inverse;
  const float square = u * u;  // near 0: Cephes' tanhf
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const float near = p * square * magnitude + magnitude;
  const float t = magnitude < 0.625f ? near : far;
  return {cap * (u < 0.0f ? -t : t), 4.0f * w * inverse * inverse};
}
MEGACTX_INLINE Capped<double> soft_cap(double x, double cap) {
  const double u = x / cap, w = std::exp(-2.0 * std::fabs(u));
  return {cap * std::tanh(u), 4.0 * w / ((1.0 + w) * (1.0 + w))};
}

MEGACTX_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Larger {  // of two, where a NaN is never the larger
  template <class T>
  MEGACTX_INLINE static T of(T x, T y) { return y > x ? y : x; }
};
struct Sum {
  template <class T>
  MEGACTX_INLINE static T of(T x, T y) { return x + y; }
};

template <class Operation, int kWidth, class T>
MEGACTX_INLINE T fold(T* lanes) {
  if constexpr (kWidth == 0) {
    return lanes[0];
  } else {
    for (int i = 0; i < kWidth; ++i) lanes[i] = Operation::of(lanes[i], lanes[i + kWidth]);
    return fold<Operation, kWidth / 2>(lanes);
  }
}

// All of x, whose size is a multiple of kLanes: lane by lane, then the lanes by halves.
template <class Operation, class T>
MEGACTX_INLINE T reduce(const T* x, int64_t size, T start) {
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = start;
  for (int64_t b = 0; b < size; b += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] = Operation::of(lanes[i], x[b + i]);
  }
  return fold<Operation, kLanes / 2>(lanes);
}

// Where x, whose size is a multiple of kLanes, is `value` for the first time; `size` if nowhere. A search one by one
// costs up to what the exponentials do, so first the lanes it is among, then which of them, both as vectors; where
// there are few, folding the vectors would be slower.
template <class T>
MEGACTX_INLINE int64_t first_of(const T* x, int64_t size, T value) {
  if (size <= 2 * kLanes) {
    int64_t at = 0;
    while (at < size && !(x[at] == value)) ++at;
    return at;
  }
  for (int64_t b = 0; b < size; b += kLanes) {
    uint32_t among = 0;
    for (int i = 0; i < kLanes; ++i) among |= x[b + i] == value ? 1 : 0;
    if (among == 0) continue;
    int32_t at = kLanes;
    for (int32_t i = 0; i < kLanes; ++i) at = std::min(at, x[b + i] == value ? i : int32_t{kLanes});
    return b + at;
  }
  return size;
}

// n logits from `begin`, then -inf to a full set of lanes: in `room`, unless they lie in memory like that.
template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE const T* read(const Symbols<const typename Format::Stored>& z, int64_t begin, int64_t n, T* room) {
  const auto* from = z.data + begin * z.stride;
  if (z.stride == 1) {
    if constexpr (std::is_same_v<T, typename Format::Stored>) {
      if (n % kLanes == 0) return from;
    }
    for (int64_t i = 0; i < n; ++i) room[i] = Format::widen(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) room[i] = Format::widen(from[i * z.stride]);
  }
  for (int64_t i = n; i < padded(n); ++i) room[i] = -kInfinity<T>;
  return room;
}

// The largest logit, before the soft cap, which keeps the order. NaN where nothing can be made of the row.
template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE Sums find_top(const Symbols<const typename Format::Stored>& z, int64_t size, const Options& options) {
  T room[kChunk];
  const T* chunk = nullptr;
  T top = -kInfinity<T>;
  int64_t at = 0;
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t n = std::min(kChunk, size - begin);
    chunk = read<Format>(z, begin, n, room);
    const T highest = reduce<Larger>(chunk, padded(n), -kInfinity<T>);
    if (highest > top) top = highest, at = begin;
  }
  const int64_t n = std::min(kChunk, size - at);
  if (at + n < size) chunk = read<Format>(z, at, n, room);
  const int64_t first = first_of(chunk, padded(n), top);
  Sums sums;
  at += first;
  if (first >= n) at = 0, top = kNaN<T>;  // no symbol but NaN, at least where it was looked for
  if (options.softcap > 0) top = soft_cap(top, static_cast<T>(options.softcap)).value;
  sums.argmax = at;
  sums.top = std::fabs(top) < kInfinity<T> ? top : kNaN<T>;
  return sums;
}

// exp(z - top) into `exponentials`, 0 at argmax, and the derivative of the soft cap into `slopes`, each unless null.
template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE void exponentiate(const Symbols<const typename Format::Stored>& z, int64_t size, const Options& options,
                                 Sums& sums, T* exponentials, T* slopes) {
  T room[kChunk], x[kChunk], slope[kChunk];
  const T top = static_cast<T>(sums.top), cap = static_cast<T>(options.softcap);
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t n = std::min(kChunk, size - begin), lanes = padded(n);
    const T* from = read<Format>(z, begin, n, room);
    if (options.softcap > 0) {
      for (int64_t i = 0; i < lanes; ++i) {
        const Capped<T> capped = soft_cap(from[i], cap);
        x[i] = capped.value - top;
        slope[i] = capped.slope;
      }
      if (slopes != nullptr) std::copy(slope, slope + n, slopes + begin);
    } else {
      for (int64_t i = 0; i < lanes; ++i) x[i] = from[i] - top;
    }
    if (options.mean) {
      for (int64_t i = n; i < lanes; ++i) x[i] = 0;
      sums.distance += reduce<Sum>(x, lanes, T{0});
    }
    for (int64_t i = n; i < lanes; ++i) x[i] = -kInfinity<T>;
    if (sums.argmax - begin >= 0 && sums.argmax - begin < n) x[sums.argmax - begin] = -kInfinity<T>;
    for (int64_t i = 0; i < lanes; ++i) x[i] = exponential(x[i]);
    sums.rest += reduce<Sum>(x, lanes, T{0});
    if (exponentials != nullptr) std::copy(x, x + n, exponentials + begin);
  }
  if (sums.top != sums.top) sums.rest = sums.top;
  sums.log_total = std::log1p(sums.rest);
}

// dz_v = scale exp(z_v - top) - shift, less the weights of the targets.
struct Gradient {
  double total, pull, inverse, scale, shift;

  Gradient(const std::vector<Target>& targets, const Sums& sums, int64_t size, const Options& options) : total(0) {
    for (const Target& t : targets) total += t.id >= 0 ? t.weight : 0;
    pull = 2 * options.z_loss * (sums.top + sums.log_total) * total;
    inverse = 1 / (1 + sums.rest);
    scale = (total + pull) * inverse;
    shift = options.smoothing * total / static_cast<double>(size);
  }

  // At a target or the largest logit: own p - own from 1 - p, and p times the weights of the other targets alone.
  double at(int64_t v, double exponential, const std::vector<Target>& targets, const Sums& sums,
            const Options& options) const {
    double own = 0, others = 0;
    for (const Target& t : targets) {
      if (t.id >= 0) (t.id == v ? own : others) += t.weight;
    }
    const bool is_top = v == sums.argmax;
    const double p = (is_top ? 1 : exponential) * inverse, rest = is_top ? sums.rest * inverse : 1 - p;
    return (others + pull) * p - own * rest + options.smoothing * own - shift;
  }
};

// The gradient into `grad`, from the exponentials and slopes of the row. The former may lie in the memory of `grad`.
template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE void write_gradient(const Symbols<typename Format::Stored>& grad, int64_t size, const Options& options,
                                   const Sums& sums, const T* exponentials, const T* slopes, Scratch<T>& scratch) {
  const std::vector<Target>& targets = scratch.targets;
  const Gradient gradient(targets, sums, size, options);
  const T scale = static_cast<T>(gradient.scale), shift = static_cast<T>(gradient.shift);
  // The columns with digits to lose, before the pass overwrites what they are made of.
  std::vector<T>& special = scratch.special;
  special.resize(targets.size() + 1);
  const auto id = [&](size_t i) { return i < targets.size() ? targets[i].id : sums.argmax; };
  for (size_t i = 0; i <= targets.size(); ++i) {
    const int64_t v = id(i);
    if (v < 0) continue;
    const double slope = slopes == nullptr ? 1.0 : slopes[v];
    special[i] = static_cast<T>(slope * gradient.at(v, exponentials[v], targets, sums, options));
  }
  T x[kChunk];
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t n = std::min(kChunk, size - begin);
    for (int64_t i = 0; i < n; ++i) x[i] = exponentials[begin + i] * scale - shift;
    if (slopes != nullptr) {
      for (int64_t i = 0; i < n; ++i) x[i] *= slopes[begin + i];
    }
    auto* to = grad.data + begin * grad.stride;
    if (grad.stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = Format::narrow(x[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * grad.stride] = Format::narrow(x[i]);
    }
  }
  for (size_t i = 0; i <= targets.size(); ++i) {
    if (id(i) >= 0) grad[id(i)] = Format::narrow(special[i]);
  }
}

template <class T>
struct Results {
  T *log_p, *mean_log_p, *lse;  // [K], [1], [1]; null where not wanted
};

// Everything of one context of one row. `scratch.targets` has the targets; `grad.data` is null, another row, or z's.
template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE void run(const Symbols<const typename Format::Stored>& z, const Symbols<typename Format::Stored>& grad,
                        int64_t size, const Options& options, const Results<T>& results, Scratch<T>& scratch) {
  std::vector<Target>& targets = scratch.targets;
  bool any = false, bad = false;
  for (const Target& t : targets) any |= t.id != kIgnored, bad |= t.id == kBad;
  Sums sums;
  if (any) {
    sums = find_top<Format>(z, size, options);
    for (Target& t : targets) {
      if (t.id < 0) continue;
      const T logit = Format::widen(z[t.id]);
      t.logit = options.softcap > 0 ? soft_cap(logit, static_cast<T>(options.softcap)).value : logit;
    }
    T *exponentials = nullptr, *slopes = nullptr;
    const bool differentiate = grad.data != nullptr && !bad;
    if (differentiate) {
      if constexpr (std::is_same_v<T, typename Format::Stored>) {
        if (grad.stride == 1) exponentials = grad.data;
      }
      if (exponentials == nullptr) scratch.exponentials.resize(size), exponentials = scratch.exponentials.data();
      if (options.softcap > 0) scratch.slopes.resize(size), slopes = scratch.slopes.data();
    }
    exponentiate<Format>(z, size, options, sums, exponentials, slopes);
    if (differentiate) write_gradient<Format>(grad, size, options, sums, exponentials, slopes, scratch);
  }
  if (grad.data != nullptr && (!any || bad)) {
    for (int64_t v = 0; v < size; ++v) grad[v] = Format::narrow(bad ? kNaN<T> : T{0});
  }
  if (results.lse != nullptr) *results.lse = static_cast<T>(sums.top + sums.log_total);
  if (results.mean_log_p != nullptr) {
    *results.mean_log_p = static_cast<T>(sums.distance / static_cast<double>(size) - sums.log_total);
  }
  if (results.log_p == nullptr) return;
  for (size_t k = 0; k < targets.size(); ++k) {
    const Target& t = targets[k];
    const double log_p = (t.id == sums.argmax ? 0.0 : t.logit - sums.top) - sums.log_total;
    results.log_p[k] = t.id == kBad ? kNaN<T> : t.id == kIgnored ? T{0} : static_cast<T>(log_p);
  }
}

}  // namespace megactx::mtp

// What the pairs of one token are turned and damped by: from its position and level of detail, without tables of
// angles. The same for all heads of q and of k.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "phase.h"
#include "vector.h"

namespace megactx {

constexpr int64_t kLanes = 8;           // values computed side by side
constexpr int64_t kBlock = 2 * kLanes;  // pairs read at once, at most
constexpr double kTwoPi = 6.283185307179586;

// The lane that pair j of a head takes. Where a word holds two channels, the even pairs of a block come first: of a
// whole one, or of the half one that may follow.
inline int64_t lane_of(int64_t j, int64_t pairs, bool even_first) {
  for (const int64_t size : {kBlock, kLanes}) {
    const int64_t block = j / size * size, i = j % size;
    if (even_first && block + size <= pairs) return block + i / 2 + i % 2 * (size / 2);
  }
  return j;
}

// Constants of each pair, by lanes, made once per kind of head and thread; padded to whole blocks.
struct Frequencies {
  double base;
  int64_t head_dim, lod_pairs;
  bool even_first;
  std::vector<int64_t> by_position, by_level;  // phase per unit; each is 0 where the other one counts
  std::vector<double> damped;                  // the frequency f_j, 0 for pairs turned by the level

  Frequencies(double base, int64_t head_dim, int64_t lod_pairs, bool even_first)
      : base(base), head_dim(head_dim), lod_pairs(lod_pairs), even_first(even_first) {
    const int64_t pairs = head_dim / 2, turned = pairs - lod_pairs;
    const auto padded = static_cast<size_t>((pairs + kBlock - 1) / kBlock * kBlock);
    by_position.resize(padded), by_level.resize(padded), damped.resize(padded);
    const std::vector<int64_t> positions = phase_steps(base, head_dim, turned);
    const std::vector<int64_t> levels = phase_steps(base, 2 * lod_pairs, lod_pairs);
    for (int64_t j = 0; j < pairs; ++j) {
      const int64_t lane = lane_of(j, pairs, even_first);
      if (j < turned) {
        by_position[lane] = positions[j];
        damped[lane] = std::pow(base, -2.0 * j / head_dim);
      } else {
        by_level[lane] = levels[j - turned];
      }
    }
  }

  static const Frequencies& of(double base, int64_t head_dim, int64_t lod_pairs, bool even_first) {
    thread_local std::vector<Frequencies> known;
    for (const Frequencies& f : known) {
      if (f.base == base && f.head_dim == head_dim && f.lod_pairs == lod_pairs && f.even_first == even_first) return f;
    }
    if (known.size() == 64) known.clear();
    return known.emplace_back(base, head_dim, lod_pairs, even_first);
  }
};

// Cosine and sine of `phase` 2^-64 turns, within 1e-7: the quarter turn from the integer, which is exact, and Cephes'
// polynomials on [-pi/4, pi/4].
MEGACTX_INLINE void cos_sin(int64_t phase, float& cosine, float& sine) {
  const auto turn = static_cast<uint32_t>((static_cast<uint64_t>(phase) + 0x80000000u) >> 32);
  const uint32_t quarter = (turn + 0x20000000u) >> 30;
  const auto rest = static_cast<int32_t>(turn - (quarter << 30));
  const auto x = static_cast<float>(rest * (kTwoPi * 0x1p-32));
  const float z = x * x;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  // An odd quarter swaps the two; by bits, since a branch would not vectorise.
  const auto c_bits = std::bit_cast<uint32_t>(c), s_bits = std::bit_cast<uint32_t>(s);
  const uint32_t swap = (c_bits ^ s_bits) & (0u - (quarter & 1));
  cosine = std::bit_cast<float>(c_bits ^ swap ^ ((quarter + 1) & 2) << 30);
  sine = std::bit_cast<float>(s_bits ^ swap ^ (quarter & 2) << 30);
}
inline void cos_sin(int64_t phase, double& cosine, double& sine) {
  const uint64_t quarter = (static_cast<uint64_t>(phase) + (uint64_t{1} << 61)) >> 62;
  const double x = static_cast<double>(static_cast<int64_t>(phase - (quarter << 62))) * (kTwoPi * 0x1p-64);
  const double c = std::cos(x), s = std::sin(x);
  cosine = quarter & 1 ? s : c;
  sine = quarter & 1 ? c : s;
  if ((quarter + 1) & 2) cosine = -cosine;
  if (quarter & 2) sine = -sine;
}

MEGACTX_INLINE float exp_damping(float x) { return exp_nonpositive(x); }
inline double exp_damping(double x) { return std::exp(x); }

enum class Sigma { none, uniform, power };

// The standard deviation of the span a token of this level stands for; finite, so that times a frequency of 0 it is 0.
inline double spread(Sigma sigma, int64_t block_size, int64_t level) {
  if (sigma == Sigma::none || (sigma == Sigma::uniform && level <= 0)) return 0.0;
  const double width = std::pow(static_cast<double>(block_size), static_cast<double>(level));
  return std::min(sigma == Sigma::power ? width : std::sqrt((width * width - 1.0) / 12.0), 1e300);
}

// Per pair: cosine and sine, both damped, and the damping itself. `direction` -1 turns the other way.
template <class T>
MEGACTX_INLINE void fill_rotation(const Frequencies& f, int64_t position, int64_t level, double spread, T direction,
                                  T* __restrict cosines, T* __restrict sines, T* __restrict damping) {
  const auto padded = static_cast<int64_t>(f.damped.size());
  // Wrapping products; signed ones would overflow.
  const auto p = static_cast<uint64_t>(position), l = static_cast<uint64_t>(level);
  for (int64_t j = 0; j < padded; j += kLanes) {
    uint64_t phases[kLanes];
    T g[kLanes];
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) phases[i] = p * static_cast<uint64_t>(f.by_position[j + i]);
    if (f.lod_pairs != 0) {
      MEGACTX_VECTOR_LOOP
      for (int i = 0; i < kLanes; ++i) phases[i] += l * static_cast<uint64_t>(f.by_level[j + i]);
    }
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) g[i] = 1;
    if (spread != 0.0) {
      MEGACTX_VECTOR_LOOP
      for (int i = 0; i < kLanes; ++i) {
        const double deviation = spread * f.damped[j + i];
        g[i] = exp_damping(static_cast<T>(-0.5 * (deviation * deviation)));
      }
    }
    MEGACTX_VECTOR_LOOP
    for (int i = 0; i < kLanes; ++i) {
      T c, s;
      cos_sin(static_cast<int64_t>(phases[i]), c, s);
      cosines[j + i] = c * g[i];
      sines[j + i] = s * g[i] * direction;
      damping[j + i] = g[i];
    }
  }
}

}  // namespace megactx

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in the layout that every
// backend of sample_contexts shares: key = seed, counter = (id >> 1, context, step low, step high). The four words
// serve two symbols: (w0, w1) the even id, (w2, w3) the odd one, first word high. So the noise of a symbol depends on
// (seed, step, context, id) alone: not on the batch, the packing, the thread or the order of evaluation.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace megactx {

struct PhiloxStream {
  uint32_t key[2];
  uint32_t context;
  uint32_t step[2];

  PhiloxStream(int64_t seed, int64_t context_index, int64_t step_index)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        context(static_cast<uint32_t>(context_index)),
        step{static_cast<uint32_t>(step_index), static_cast<uint32_t>(static_cast<uint64_t>(step_index) >> 32)} {}
};

MEGACTX_INLINE void philox4x32(const PhiloxStream& s, uint32_t counter, uint32_t out[4]) {
  uint32_t c0 = counter, c1 = s.context, c2 = s.step[0], c3 = s.step[1];
  uint32_t k0 = s.key[0], k1 = s.key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The words of the symbols first_id .. first_id + N - 1 (first_id and N even).
template <int N>
MEGACTX_INLINE void philox_words(const PhiloxStream& s, uint32_t first_id, uint32_t* high, uint32_t* low) {
  for (uint32_t i = 0; i < N / 2; ++i) {
    uint32_t w[4];
    philox4x32(s, (first_id >> 1) + i, w);
    high[2 * i] = w[0], low[2 * i] = w[1];
    high[2 * i + 1] = w[2], low[2 * i + 1] = w[3];
  }
}

// Standard Gumbel noise from 64 random bits. u keeps its relative precision near 0, which is where the large values
// come from: with 24-bit uniforms nothing above 16.6 could ever be drawn.
inline float gumbel(uint32_t high, uint32_t low) {
  float u = static_cast<float>(high) * 0x1p-32f + static_cast<float>(low) * 0x1p-64f;
  u = u < 0x1p-64f ? 0x1p-64f : u;
  u = u > 1.0f - 0x1p-24f ? 1.0f - 0x1p-24f : u;
  return -std::log(-std::log1p(-u));
}

// An upper bound of gumbel(high, any low) at the price of one conversion: -log1p(-u) >= u gives g <= -ln u, and the
// bits of a float read as an integer are a lower bound of its log2.
MEGACTX_INLINE float gumbel_bound(uint32_t high) {
  const int32_t bits = std::bit_cast<int32_t>(static_cast<float>(high));
  return 0.693147181f * (159.0f - static_cast<float>(bits) * 0x1p-23f);
}
constexpr float kGumbelMax = 44.3615f;  // gumbel(0, 0) = 64 ln 2, rounded up

}  // namespace megactx

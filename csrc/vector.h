// Vector code without intrinsics: fixed-trip loops that the compiler turns into SIMD, compiled once per instruction
// set and chosen at load time, so that one wheel runs on any x86-64 and still uses AVX-512 where the machine has it.
//
// The extension is compiled with -ffp-contract=off: every clone rounds the same way, so the drawn token does not
// depend on the machine that draws it.
#pragma once

#include <bit>
#include <cstdint>

// MEGACTX_BASELINE (a test compiles with it) leaves the baseline version alone.
#if !defined(__x86_64__) || !defined(__gnu_linux__) || !defined(__GLIBC__) || defined(MEGACTX_BASELINE)
#define MEGACTX_CLONES
#elif !defined(__clang__) && __GNUC__ >= 12  // x86-64-v4 multiplies 64-bit lanes: Philox is 1.5 times as fast
#define MEGACTX_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MEGACTX_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

// Helpers of a cloned function must be inlined into each clone: a call would land in baseline code.
#define MEGACTX_INLINE inline __attribute__((always_inline))

// Before a loop of 16 or fewer turns: GCC would unroll it completely before it gets to see a vector in it.
#if defined(__GNUC__) && !defined(__clang__)
#define MEGACTX_VECTOR_LOOP _Pragma("GCC unroll 1")
#else
#define MEGACTX_VECTOR_LOOP
#endif

namespace megactx {

// Integers that compare as the floats do (-0 just below +0; NaN outside [-inf, inf]). Integer minima and maxima
// vectorise without -ffast-math. The map is its own inverse.
MEGACTX_INLINE int32_t ordered(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
MEGACTX_INLINE float from_ordered(int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// exp(x) for x <= 0, within 1 ulp; 0 below -87, where the true value is close to the smallest normal float. A NaN stays
// one. (Above 0, up to 87, it is as exact.)
// Cody-Waite reduction by ln 2 in two parts, then the minimax polynomial of Cephes' expf on [-ln2/2, ln2/2].
MEGACTX_INLINE float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float rounded = clamped * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(rounded) + 127) << 23);  // n is its lowest bits
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace megactx

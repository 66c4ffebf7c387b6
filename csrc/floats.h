// Element formats: how each is stored and computed with. The conversions are integer arithmetic, which vectorises in
// every clone; the hardware's own (F16C, AVX512-BF16) are in some instruction sets only.
//
// Formats of 16 bits also come two to a word: shifts and masks take the two apart and put them together where
// vectors of single elements would have to be unpacked and packed across lanes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "vector.h"

namespace megactx {

template <class T>
struct Plain {
  using Stored = T;
  using Computed = T;
  MEGACTX_INLINE static T widen(T x) { return x; }
  MEGACTX_INLINE static T narrow(T x) { return x; }
};
using Float32 = Plain<float>;
using Float64 = Plain<double>;

struct BFloat16 {
  using Stored = uint16_t;
  using Computed = float;

  MEGACTX_INLINE static float low(uint32_t word) { return std::bit_cast<float>(word << 16); }
  MEGACTX_INLINE static float high(uint32_t word) { return std::bit_cast<float>(word & 0xffff0000); }
  MEGACTX_INLINE static uint32_t pack(float low, float high) {
    return rounded(low) >> 16 | (rounded(high) & 0xffff0000);
  }
  MEGACTX_INLINE static float widen(uint16_t x) { return low(x); }
  MEGACTX_INLINE static uint16_t narrow(float x) { return static_cast<uint16_t>(rounded(x) >> 16); }

 private:
  // The upper half to nearest, ties to even; a NaN stays one.
  MEGACTX_INLINE static uint32_t rounded(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return x != x ? 0x7fc00000 : nearest;
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Computed = float;

  MEGACTX_INLINE static float low(uint32_t word) { return value(word & 0xffff); }
  MEGACTX_INLINE static float high(uint32_t word) { return value(word >> 16); }
  MEGACTX_INLINE static uint32_t pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
  MEGACTX_INLINE static float widen(uint16_t x) { return value(x); }
  MEGACTX_INLINE static uint16_t narrow(float x) { return static_cast<uint16_t>(rounded(x)); }

 private:
  // Nothing here is a subnormal float: the thread may flush those to zero.
  MEGACTX_INLINE static float value(uint32_t half) {
    const uint32_t magnitude = half << 13 & 0x0fffe000;  // exponent and mantissa where a float has them
    const bool subnormal = magnitude < 0x00800000;       // made normal by 2^-14, which is then taken off again
    const uint32_t rebias = magnitude >= 0x0f800000 ? 0x70000000 : 0x38000000;  // infinities and NaN: to 255
    const float x = std::bit_cast<float>(magnitude + (subnormal ? 0x38800000 : rebias));
    const auto bits = std::bit_cast<uint32_t>(x - (subnormal ? 0x1p-14f : 0.0f));
    return std::bit_cast<float>(bits | (half & 0x8000) << 16);
  }

  // To nearest, ties to even, from 65,520 to infinity; a NaN stays one.
  MEGACTX_INLINE static uint32_t rounded(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    // Below 2^-14 a half is a multiple of 2^-24, the spacing of floats from 0.5 to 1: adding 0.5 rounds to it.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t half = magnitude < 0x38800000 ? subnormal : std::min(normal, uint32_t{0x7c00});
    return (x != x ? 0x7e00 : half) | (bits >> 16 & 0x8000);
  }
};

}  // namespace megactx

// The constants of a fixed-point phase: F_j = base^(-2j / D) / (2 pi) * 2^64, rounded to an integer, modulo 2^64.
//
// A phase is position * F_j in wrapping 64-bit arithmetic: the wrap drops exactly the whole turns. Half a unit of F_j
// times a position of 10^12 is 2e-7 of an angle, so F_j must be right to its last bit, which takes more than double
// precision. It takes no logarithm, however: the ratio base^(-2/D) is a root, which Newton finds by multiplying.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace megactx {

// A positive number of 256 bits: limbs (least significant first, the top bit set) * 2^(exponent - 255).
struct Wide {
  static constexpr int kLimbs = 8;
  std::array<uint32_t, kLimbs> limbs;
  int exponent;

  static Wide of(double x) {
    int exponent;
    const auto mantissa = static_cast<uint64_t>(std::ldexp(std::frexp(x, &exponent), 64));
    Wide w{{}, exponent - 1};
    w.limbs[kLimbs - 1] = static_cast<uint32_t>(mantissa >> 32);
    w.limbs[kLimbs - 2] = static_cast<uint32_t>(mantissa);
    return w;
  }

  bool bit(int i) const { return i >= 0 && i < 32 * kLimbs && (limbs[i / 32] >> (i % 32) & 1); }

  // The nearest integer, modulo 2^64.
  uint64_t rounded() const {
    const int point = 255 - exponent;
    uint64_t integer = 0;
    for (int i = 0; i < 64; ++i) integer |= uint64_t{bit(point + i)} << i;
    return integer + bit(point - 1);
  }
};

inline Wide operator*(const Wide& x, const Wide& y) {
  std::array<uint32_t, 2 * Wide::kLimbs> product{};
  for (int i = 0; i < Wide::kLimbs; ++i) {
    uint64_t carry = 0;
    for (int j = 0; j < Wide::kLimbs; ++j) {
      carry += uint64_t{x.limbs[i]} * y.limbs[j] + product[i + j];
      product[i + j] = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    product[i + Wide::kLimbs] = static_cast<uint32_t>(carry);
  }
  const int top = product.back() >> 31;  // two mantissas of [1, 2) make one of [1, 4)
  Wide z{{}, x.exponent + y.exponent + top};
  for (int i = 0; i < Wide::kLimbs; ++i) {
    const uint64_t pair = uint64_t{product[i + Wide::kLimbs]} << 32 | product[i + Wide::kLimbs - 1];
    z.limbs[i] = static_cast<uint32_t>(pair >> (32 - (top ? 0 : 1)));
  }
  return z;
}

inline Wide power(Wide x, uint32_t n) {
  Wide result = Wide::of(1.0);
  for (; n != 0; n >>= 1, x = x * x) {
    if (n & 1) result = result * x;
  }
  return result;
}

// 1 + (1 - p) / n for a p close to 1: the factor of Newton's next iterate of an n-th root.
inline Wide newton_factor(const Wide& p, uint32_t n) {
  // (n + 1 - p) / n with 255 bits behind the point: a subtraction with borrow, then a long division.
  std::array<uint32_t, Wide::kLimbs + 1> digits{};
  const uint64_t count = uint64_t{n} + 1;
  digits[Wide::kLimbs - 1] = static_cast<uint32_t>(count << 31);
  digits[Wide::kLimbs] = static_cast<uint32_t>(count >> 1);
  const int shift = p.exponent < 0 ? 1 : 0;
  int64_t borrow = 0;
  for (int i = 0; i <= Wide::kLimbs; ++i) {
    const uint64_t low = i < Wide::kLimbs ? p.limbs[i] : 0, high = i + 1 < Wide::kLimbs ? p.limbs[i + 1] : 0;
    const int64_t difference = int64_t{digits[i]} - static_cast<uint32_t>((high << 32 | low) >> shift) + borrow;
    digits[i] = static_cast<uint32_t>(difference);
    borrow = difference >> 32;
  }
  uint64_t remainder = 0;
  for (int i = Wide::kLimbs; i >= 0; --i) {
    const uint64_t part = remainder << 32 | digits[i];
    digits[i] = static_cast<uint32_t>(part / n);
    remainder = part % n;
  }
  Wide factor{{}, digits[Wide::kLimbs - 1] >> 31 ? 0 : -1};
  for (int i = 0; i < Wide::kLimbs; ++i) {
    const uint64_t pair = uint64_t{digits[i]} << 32 | (i > 0 ? digits[i - 1] : 0);
    factor.limbs[i] = static_cast<uint32_t>(pair >> (32 + factor.exponent));
  }
  return factor;
}

// F_j for j = 0 .. pairs - 1 of `head_dim` channels, as signed integers.
inline std::vector<int64_t> phase_steps(double base, int64_t head_dim, int64_t pairs) {
  // 2^64 / (2 pi) = 1.27... * 2^61
  Wide step{{0xdebbc561, 0xfe5163ab, 0x3c439041, 0xdb629599, 0xf534ddc0, 0xfc2757d1, 0x4e441529, 0xa2f9836e}, 61};
  Wide ratio = Wide::of(1.0);
  if (pairs > 1) {
    const auto root = static_cast<uint32_t>(head_dim / 2);
    ratio = Wide::of(std::pow(base, -1.0 / root));
    for (int i = 0; i < 4; ++i) ratio = ratio * newton_factor(Wide::of(base) * power(ratio, root), root);
  }
  std::vector<int64_t> steps;
  for (int64_t j = 0; j < pairs; ++j, step = step * ratio) steps.push_back(static_cast<int64_t>(step.rounded()));
  return steps;
}

}  // namespace megactx

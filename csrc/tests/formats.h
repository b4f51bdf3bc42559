// Floating-point formats by definition, slow and plain, and arrays of them with guards around.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"

// What a type can hold: bits of the significand that are stored, and the exponent's bias.
struct Format {
  std::size_t bytes;
  int mantissa, bias;
  double unit() const { return std::ldexp(1.0, -mantissa - 1); }
  double least() const { return std::ldexp(1.0, 1 - bias); }  // normal number
  // An exact result becomes this at worst; results below the normal numbers may be flushed to 0.
  double rounding(double x) const {
    return unit() * std::fabs(x) + (bytes == 4 || mantissa == 7 ? 2.0 * least() : least() * unit());
  }

  std::uint32_t encode(double x) const {
    const int exponent_bits = static_cast<int>(bytes) * 8 - 1 - mantissa;
    const std::uint32_t infinite = ((1U << exponent_bits) - 1U) << mantissa;
    const std::uint32_t sign = std::signbit(x) ? 1U << (bytes * 8 - 1) : 0U;
    if (std::isnan(x)) return infinite | 1U << (mantissa - 1);
    if (x == 0.0 || std::isinf(x)) return (x == 0.0 ? 0U : infinite) | sign;
    const int exponent = std::max(std::ilogb(x), 1 - bias);
    const double whole = std::nearbyint(std::ldexp(std::fabs(x), mantissa - exponent));  // half to even
    const double bits = whole + std::ldexp(exponent + bias - 1, mantissa);
    return std::min(static_cast<std::uint32_t>(std::min(bits, 4e9)), infinite) | sign;
  }
  double decode(std::uint32_t bits) const {
    const int exponent_bits = static_cast<int>(bytes) * 8 - 1 - mantissa;
    const auto exponent = static_cast<int>(bits >> mantissa & ((1U << exponent_bits) - 1U));
    const double fraction = bits & ((1U << mantissa) - 1U);
    double size = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                : std::ldexp(fraction + std::ldexp(1.0, mantissa), exponent - bias - mantissa);
    if (exponent == (1 << exponent_bits) - 1) {
      size = fraction == 0.0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    return bits >> (bytes * 8 - 1) != 0 ? -size : size;
  }
};

// An array with guards around it, at an address that is a multiple of nothing but its element's size.
class Array {
 public:
  Array(Format format, std::size_t size)
      : format_(format), size_(size), bytes_(2 * kGuard + size * format.bytes, 0xa5) {}
  ~Array() {
    for (std::size_t k = 0; k < kGuard; ++k) CHECK(bytes_[k] == 0xa5 && bytes_[bytes_.size() - 1 - k] == 0xa5);
  }
  Array(const Array&) = default;
  Array& operator=(const Array&) = delete;

  std::size_t size() const { return size_; }
  Format format() const { return format_; }
  void* data() { return bytes_.data() + kGuard; }
  float* floats() { return static_cast<float*>(data()); }
  std::uint32_t bits(std::size_t k) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, bytes_.data() + kGuard + k * format_.bytes, format_.bytes);
    return bits;
  }
  void set_bits(std::size_t k, std::uint32_t bits) {
    std::memcpy(bytes_.data() + kGuard + k * format_.bytes, &bits, format_.bytes);
  }
  double operator[](std::size_t k) const { return format_.decode(bits(k)); }
  void set(std::size_t k, double x) { set_bits(k, format_.encode(x)); }
  void fill(std::uint64_t seed, double low, double high) {
    const Draws draws(seed);
    for (std::size_t k = 0; k < size_; ++k) set(k, low + (high - low) * draws.uniform(k));
  }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr std::size_t kGuard = 68;
  Format format_;
  std::size_t size_;
  std::vector<unsigned char> bytes_;
};

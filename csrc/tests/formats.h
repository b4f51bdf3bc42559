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

// A format: its size, the stored bits of its significand, and its exponent's bias.
struct Format {
  std::size_t bytes;
  int mantissa, bias;
  double unit() const { return std::ldexp(1.0, -mantissa - 1); }
  double min_normal() const { return std::ldexp(1.0, 1 - bias); }
  // Returns the largest error of rounding x; results below the normal numbers may be flushed to 0.
  double rounding(double x) const {
    return unit() * std::fabs(x) + (bytes == 4 || mantissa == 7 ? 2.0 * min_normal() : min_normal() * unit());
  }

  std::uint32_t encode(double x) const {
    const int exponent_bits = static_cast<int>(bytes) * 8 - 1 - mantissa;
    const std::uint32_t infinite = ((1U << exponent_bits) - 1U) << mantissa;
    const std::uint32_t sign = std::signbit(x) ? 1U << (bytes * 8 - 1) : 0U;
    if (std::isnan(x)) return infinite | 1U << (mantissa - 1);
    if (x == 0.0 || std::isinf(x)) return (x == 0.0 ? 0U : infinite) | sign;
    const int exponent = std::max(std::ilogb(x), 1 - bias);
    const double significand = std::nearbyint(std::ldexp(std::fabs(x), mantissa - exponent));  // half to even
    const double bits = significand + std::ldexp(exponent + bias - 1, mantissa);
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

constexpr Format kSingle{4, 23, 127}, kBfloat16{2, 7, 127}, kFloat16{2, 10, 15};

// An array of NaN with guards around it, at an address that is a multiple of `alignment` and, without one, of nothing
// but its element's size. An array of size 0 stands for null.
class Array {
 public:
  Array(Format format, std::size_t size, std::size_t alignment = 0)
      : format_(format), size_(size), bytes_(2 * kGuard + size * format.bytes, 0xff) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    first_ = alignment == 0 ? 68 : kGuard / 2 + alignment - (address + kGuard / 2) % alignment;
    std::fill(bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(first_), kByte);
    std::fill(bytes_.begin() + static_cast<std::ptrdiff_t>(first_ + size * format.bytes), bytes_.end(), kByte);
  }
  ~Array() {
    const auto intact = [](unsigned char byte) { return byte == kByte; };
    CHECK(std::all_of(bytes_.data(), bytes_.data() + first_, intact));
    CHECK(std::all_of(bytes_.data() + first_ + size_ * format_.bytes, bytes_.data() + bytes_.size(), intact));
  }
  Array(const Array&) = default;
  Array& operator=(const Array&) = delete;

  std::size_t size() const { return size_; }
  Format format() const { return format_; }
  template <class T = void>
  T* data() {
    return size_ > 0 ? reinterpret_cast<T*>(bytes_.data() + first_) : nullptr;
  }
  std::uint32_t bits(std::size_t k) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, bytes_.data() + first_ + k * format_.bytes, format_.bytes);
    return bits;
  }
  void set_bits(std::size_t k, std::uint32_t bits) {
    std::memcpy(bytes_.data() + first_ + k * format_.bytes, &bits, format_.bytes);
  }
  double operator[](std::size_t k) const { return format_.decode(bits(k)); }
  void set(std::size_t k, double x) { set_bits(k, format_.encode(x)); }
  Array& fill(std::uint64_t seed, double low, double high) {
    const Draws draws(seed);
    for (std::size_t k = 0; k < size_; ++k) set(k, low + (high - low) * draws.uniform(k));
    return *this;
  }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr std::size_t kGuard = 128;
  static constexpr unsigned char kByte = 0xa5;
  Format format_;
  std::size_t size_;
  std::vector<unsigned char> bytes_;
  std::size_t first_;
};

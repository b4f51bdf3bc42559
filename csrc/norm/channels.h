// What the kernels of sequence_norm.h are made of: sizes, numbers of channels in vectors, and sums over pixels.
// Everything is in an unnamed namespace: code of one instruction set must not be linked into another.
//
// Channels come last, so what belongs to a channel repeats in memory with their number, and in whole vectors with the
// period lcm(channels, kWidth). Sums have a lane of their own for each place of a stride, which is a few periods:
// vectors are full whatever the number of channels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "norm/sequence_norm.h"
#include "vector.h"

namespace rlv2v {
namespace {

constexpr std::size_t kRowElements = 2048;  // of a frame without windows, which are taken as a row: 8 KiB of f32
constexpr std::size_t kBlock = 4;           // vectors that are summed at once: an addition waits for the one before it
constexpr std::size_t kF32Additions = 64;   // that a lane makes before it is added to an f64

// Zeros at the start of a cache line: a vector that crosses two takes twice as long.
template <class Value>
class Buffer {
 public:
  explicit Buffer(std::size_t size) : values_(size + kLine / sizeof(Value)) {
    const auto address = reinterpret_cast<std::uintptr_t>(values_.data());
    first_ = values_.data() + (kLine - address % kLine) % kLine / sizeof(Value);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Value* data() { return first_; }
  const Value* data() const { return first_; }
  Value& operator[](std::size_t k) { return first_[k]; }
  const Value& operator[](std::size_t k) const { return first_[k]; }

 private:
  static constexpr std::size_t kLine = 64;
  std::vector<Value> values_;
  Value* first_;
};

// The sizes of a frame and of what is taken of it at once.
struct Plan {
  explicit Plan(const NormShape& shape)
      : channels(static_cast<std::size_t>(shape.channels)),
        batch(static_cast<std::size_t>(shape.batch)),
        steps(static_cast<std::size_t>(shape.steps)),
        window_height(static_cast<std::size_t>(shape.pool_height)),
        window_width(static_cast<std::size_t>(shape.pool_width)),
        pixels(static_cast<std::size_t>(shape.height * shape.width)),
        width(static_cast<std::size_t>(shape.width)),
        height(static_cast<std::size_t>(shape.height)),
        pooled_width(width / window_width),
        pooled_pixels(height / window_height * pooled_width),
        pools(window_height * window_width > 1) {
    if (!pools) {  // then the frame's shape does not matter
      width = std::min(pixels, std::max<std::size_t>(1, kRowElements / channels));
      height = (pixels + width - 1) / width;
      pooled_width = width;
    }
    const std::size_t period = channels / std::gcd(channels, kWidth);
    stride = std::lcm(period, kBlock) * kWidth;
    few_pixels = pooled_pixels * ((channels + kWidth - 1) / kWidth) * 4 <= stride;
  }
  // The pixels of row y: the last of a frame without windows may be shorter.
  std::size_t row_pixels(std::size_t y) const { return pools ? width : std::min(width, pixels - y * width); }

  std::size_t channels, batch, steps, window_height, window_width, pixels, width, height, pooled_width, pooled_pixels;
  bool pools;
  std::size_t stride;  // elements in which channels and blocks of vectors repeat
  bool few_pixels;     // too few for what sums over vectors cost once a frame
};

// One number a channel, repeated over a stride.
class Pattern {
 public:
  explicit Pattern(const Plan& plan) : values_(plan.stride), channels_(plan.channels), size_(plan.stride) {}
  template <class Value>
  void fill(const Value& value) {
    float* __restrict to = values_.data();
    for (std::size_t c = 0; c < channels_; ++c) to[c] = static_cast<float>(value(c));
    for (std::size_t k = channels_; k < size_; k += channels_) {
      std::memcpy(to + k, to, channels_ * sizeof(float));
    }
  }
  template <class Lanes>
  Real at(std::size_t place, const Lanes& lanes) const {
    return load(values_.data() + place, lanes);
  }
  double operator[](std::size_t channel) const { return static_cast<double>(values_[channel]); }

 private:
  Buffer<float> values_;
  std::size_t channels_, size_;
};

// Calls visit(k, place, lanes) for the vectors of `length` elements, k their first and `place` its place in a stride.
template <class Visit>
inline void for_each_vector(std::size_t length, std::size_t stride, const Visit& visit) {
  std::size_t k = 0;
  for (; k + stride <= length; k += stride) {
    for (std::size_t place = 0; place < stride; place += kWidth) visit(k + place, place, AllLanes{});
  }
  const std::size_t start = k;
  for (; k + kWidth <= length; k += kWidth) visit(k, k - start, AllLanes{});
  if (k < length) visit(k, k - start, SomeLanes(length - k));
}

// The same without a place: calls visit(k, lanes).
template <class Visit>
inline void for_each_vector(std::size_t length, const Visit& visit) {
  std::size_t k = 0;
  for (; k + kWidth <= length; k += kWidth) visit(k, AllLanes{});
  if (k < length) visit(k, SomeLanes(length - k));
}

// N sums over the pixels of a frame for each channel, in an order that depends on the frame's size alone.
template <std::size_t N>
class ChannelSums {
 public:
  explicit ChannelSums(const Plan& plan)
      : plan_(plan), lanes_(N * plan.stride), wide_(N * plan.stride), sums_(N * plan.stride) {}

  // Adds what term(k, place, lanes) returns, which must be 0 beyond the lanes, over the frame.
  template <class Term>
  void run(const Term& term) {
    if (plan_.few_pixels) run_by_pixels(term);
    else run_by_vectors(term);
  }
  const double* operator[](std::size_t n) const { return sums_.data() + n * plan_.stride; }

  struct Terms {
    Real x[N];
  };

 private:
  template <class Term>
  void run_by_pixels(const Term& term) {
    typedef double Wide __attribute__((vector_size(kWidth * sizeof(double))));
    std::fill_n(sums_.data(), N * plan_.stride, 0.0);
    for (std::size_t pixel = 0; pixel < plan_.pooled_pixels; ++pixel) {
      for_each_vector(plan_.channels, [&](std::size_t c, const auto& lanes) {
        const Terms terms = term(pixel * plan_.channels + c, c, lanes);
        for (std::size_t n = 0; n < N; ++n) {
          Wide sum;
          double* at = sums_.data() + n * plan_.stride + c;  // what lies beyond the channels is never read
          std::memcpy(&sum, at, sizeof sum);
          sum += __builtin_convertvector(terms.x[n], Wide);
          std::memcpy(at, &sum, sizeof sum);
        }
      });
    }
  }

  template <class Term>
  void run_by_vectors(const Term& term) {
    const std::size_t stride = plan_.stride;
    const std::size_t channels = plan_.channels;
    const std::size_t length = plan_.pooled_pixels * channels;
    std::fill_n(wide_.data(), N * stride, 0.0);
    for (std::size_t start = 0; start < length; start += kF32Additions * stride) {
      const std::size_t count = std::min(length - start, kF32Additions * stride);
      const std::size_t whole = count / stride * stride;
      for (std::size_t block = 0; block < stride; block += kBlock * kWidth) {
        Terms sums[kBlock] = {};
        for (std::size_t k = start + block; k < start + whole; k += stride) {
          for (std::size_t v = 0; v < kBlock; ++v) {
            const Terms terms = term(k + v * kWidth, block + v * kWidth, AllLanes{});
            for (std::size_t n = 0; n < N; ++n) sums[v].x[n] += terms.x[n];
          }
        }
        for (std::size_t v = 0; v < kBlock; ++v) {
          for (std::size_t n = 0; n < N; ++n) {
            store(lanes_.data() + n * stride + block + v * kWidth, sums[v].x[n], AllLanes{});
          }
        }
      }
      for_each_vector(count - whole, [&](std::size_t k, const auto& lanes) {
        const Terms terms = term(start + whole + k, k, lanes);
        for (std::size_t n = 0; n < N; ++n) {
          float* sum = lanes_.data() + n * stride + k;
          store(sum, load(sum, AllLanes{}) + terms.x[n], AllLanes{});
        }
      });
      for (std::size_t k = 0; k < N * stride; ++k) wide_[k] += static_cast<double>(lanes_[k]);
    }
    for (std::size_t n = 0; n < N; ++n) {
      double* __restrict sums = sums_.data() + n * stride;
      const double* __restrict wide = wide_.data() + n * stride;
      std::copy_n(wide, channels, sums);
      for (std::size_t k = channels; k < stride; k += channels) {
        for (std::size_t c = 0; c < channels; ++c) sums[c] += wide[k + c];
      }
    }
  }

  const Plan& plan_;
  Buffer<float> lanes_;
  Buffer<double> wide_, sums_;
};

#ifdef __AVX512F__
// Pairs of pixels of so few channels that a vector holds both, perhaps several times.
class NarrowPairs {
 public:
  explicit NarrowPairs(const Plan& plan)
      : fit(plan.window_width == 2 && kWidth % (2 * plan.channels) == 0) {
    if (!fit) return;
    const std::size_t channels = plan.channels;
    alignas(64) std::int32_t first[kWidth];
    alignas(64) std::int32_t source[kWidth];
    for (std::size_t k = 0; k < kWidth; ++k) {
      first[k] = static_cast<std::int32_t>(k / channels * 2 * channels + k % channels);
      source[k] = static_cast<std::int32_t>(k / (2 * channels) * channels + k % channels);
    }
    first_ = _mm512_load_si512(first);
    second_ = _mm512_add_epi32(first_, _mm512_set1_epi32(static_cast<int>(channels)));
    source_ = _mm512_load_si512(source);
  }
  // The sums of the pixels of the pairs in two vectors.
  Real sum(const float* pixels) const {
    const __m512 low = _mm512_loadu_ps(pixels);
    const __m512 high = _mm512_loadu_ps(pixels + kWidth);
    return _mm512_add_ps(_mm512_permutex2var_ps(low, first_, high), _mm512_permutex2var_ps(low, second_, high));
  }
  // Writes the pixels of a vector twice each, into two vectors.
  void twice(const float* pixels, float* to) const {
    const __m512 values = _mm512_loadu_ps(pixels);
    const __m512i half = _mm512_set1_epi32(kWidth / 2);
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(source_, values));
    _mm512_storeu_ps(to + kWidth, _mm512_permutexvar_ps(_mm512_add_epi32(source_, half), values));
  }

  const bool fit;

 private:
  __m512i first_{}, second_{}, source_{};
};
#else
struct NarrowPairs {
  explicit NarrowPairs(const Plan&) {}
};
#endif

}  // namespace
}  // namespace rlv2v

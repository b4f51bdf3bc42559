// The kernels of sequence_norm.h, compiled once for each instruction set under the name RLV2V_KERNELS. Products and
// sums may be fused where the set can. Everything else is in an unnamed namespace: code of one set must not be linked into
// another.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "norm/channels.h"
#include "norm/sequence_norm.h"
#include "vector.h"

namespace rlv2v {
namespace {

template <class T, class Void>
auto* frame_of(Void* frames, std::size_t elements) {
  using Frame = std::conditional_t<std::is_const_v<Void>, const T, T>;
  return frames == nullptr ? nullptr : static_cast<Frame*>(frames) + elements;
}

inline Real leaky(Real x, Real by, float slope) { return by > 0.0F ? x : x * slope; }

// Writes a and p of one frame.
template <class T>
class Activate {
 public:
  Activate(const NormForward& call, const Plan& plan)
      : call_(call), plan_(plan), pairs_(plan), row_(plan.width * plan.channels + 2 * kWidth) {}

  void run(std::size_t frame) {
    const std::size_t at = frame * plan_.pixels * plan_.channels;
    const T* x = frame_of<T>(call_.x, at);
    const T* residual = frame_of<T>(call_.residual, at);
    T* a = frame_of<T>(call_.activated, at);
    T* p = frame_of<T>(call_.pooled, frame * plan_.pooled_pixels * plan_.channels);
    for (std::size_t y = 0; y < plan_.height; ++y) {
      const std::size_t length = plan_.row_pixels(y) * plan_.channels;
      const std::size_t start = y * plan_.width * plan_.channels;
      const T* added = residual == nullptr ? nullptr : residual + start;
      if (p == nullptr) {
        row<false, false>(x + start, added, a + start, length);
      } else if (y % plan_.window_height == 0) {
        row<true, false>(x + start, added, a + start, length);
      } else {
        row<true, true>(x + start, added, a + start, length);
      }
      if (p == nullptr || (y + 1) % plan_.window_height != 0) continue;
      pool(p + y / plan_.window_height * plan_.pooled_width * plan_.channels);
    }
  }

 private:
  // Writes a row of a; Pools: and puts it into row_, or adds it.
  template <bool Pools, bool Adds>
  void row(const T* x, const T* residual, T* a, std::size_t length) {
    if (residual == nullptr) row<Pools, Adds, false>(x, residual, a, length);
    else row<Pools, Adds, true>(x, residual, a, length);
  }
  template <bool Pools, bool Adds, bool HasResidual>
  void row(const T* x, const T* residual, T* a, std::size_t length) {
    float* sums = row_.data();
    const float slope = call_.slope;
    for_each_vector(length, [=](std::size_t k, const auto& lanes) {
      Real value = load(x + k, lanes);
      if constexpr (HasResidual) value = value + load(residual + k, lanes);
      value = leaky(value, value, slope);
      store(a + k, value, lanes);
      if constexpr (!Pools) return;
      value = widen(narrow(value, T{}), T{});  // p is the mean of what is stored
      if constexpr (Adds) value = value + load(sums + k, lanes);
      store(sums + k, value, lanes);
    });
  }

  void pool(T* p) const {
    const float share = 1.0F / static_cast<float>(plan_.window_height * plan_.window_width);
    const std::size_t channels = plan_.channels;
#ifdef __AVX512F__
    if (pairs_.fit) {
      for_each_vector(plan_.pooled_width * channels, [&](std::size_t k, const auto& lanes) {
        store(p + k, pairs_.sum(row_.data() + 2 * k) * share, lanes);
      });
      return;
    }
#endif
    for (std::size_t x = 0; x < plan_.pooled_width; ++x) {
      const float* from = row_.data() + x * plan_.window_width * channels;
      for_each_vector(channels, [&](std::size_t c, const auto& lanes) {
        Real sum = load(from + c, lanes);
        for (std::size_t n = 1; n < plan_.window_width; ++n) sum = sum + load(from + n * channels + c, lanes);
        store(p + x * channels + c, sum * share, lanes);
      });
    }
  }

  const NormForward& call_;
  const Plan& plan_;
  const NarrowPairs pairs_;
  Buffer<float> row_;
};

// The means of p and p^2 over a frame, f64.
template <class T>
class FrameMoments {
 public:
  explicit FrameMoments(const Plan& plan)
      : mean(plan.channels), square(plan.channels), plan_(plan), sum_(plan), spread_(plan), centre_(plan) {}

  void run(const T* p) {
    const double share = 1.0 / static_cast<double>(plan_.pooled_pixels);
    sum_.run([&](std::size_t k, std::size_t, const auto& lanes) {
      return typename ChannelSums<1>::Terms{{load(p + k, lanes)}};
    });
    centre_.fill([&](std::size_t c) { return sum_[0][c] * share; });
    spread_.run([&](std::size_t k, std::size_t place, const auto& lanes) {
      const Real off = load(p + k, lanes) - centre_.at(place, lanes);
      return typename ChannelSums<2>::Terms{{off, off * off}};
    });
    for (std::size_t c = 0; c < plan_.channels; ++c) {
      const double off = spread_[0][c] * share;
      mean[c] = centre_[c] + off;
      square[c] = spread_[1][c] * share - off * off + mean[c] * mean[c];
    }
  }

  std::vector<double> mean, square;

 private:
  const Plan& plan_;
  ChannelSums<1> sum_;
  ChannelSums<2> spread_;
  Pattern centre_;
};

// A variance that rounding made negative counts as 0; a NaN stays one.
inline double inverse_spread(double variance, double eps) {
  return 1.0 / std::sqrt((variance > 0.0 ? variance : variance * 0.0) + eps);
}

template <class T>
void forward(const NormForward& call, std::size_t first, std::size_t last) {
  const Plan plan(call.shape);
  const std::size_t channels = plan.channels;
  const std::size_t length = plan.pooled_pixels * channels;
  Activate<T> activate(call, plan);
  FrameMoments<T> own(plan);
  Pattern centre(plan);
  Pattern scale(plan);
  Pattern shift(plan);
  std::vector<double> mean_sum(channels);
  std::vector<double> square_sum(channels);
  std::vector<double> scales(channels);
  for (std::size_t b = first; b < last; ++b) {
    const double seen = call.frames == nullptr ? 0.0 : call.frames[b];
    for (std::size_t c = 0; c < channels; ++c) {
      mean_sum[c] = call.frames == nullptr ? 0.0 : seen * call.mean[b * channels + c];
      square_sum[c] = call.frames == nullptr ? 0.0 : seen * call.square[b * channels + c];
    }
    for (std::size_t t = 0; t < plan.steps; ++t) {
      const std::size_t frame = t * plan.batch + b;
      if (call.activated != nullptr) activate.run(frame);
      const void* values = call.pooled != nullptr ? call.pooled : call.activated != nullptr ? call.activated : call.x;
      const T* p = static_cast<const T*>(values) + frame * length;
      const double* frame_mean = own.mean.data();
      const double* frame_square = own.square.data();
      if (call.given_mean != nullptr) {
        frame_mean = call.given_mean + frame * channels;
        frame_square = call.given_square + frame * channels;
      } else if (call.weight != nullptr || call.frame_mean != nullptr) {
        own.run(p);
      }
      if (call.weight == nullptr) {
        if (call.frame_mean != nullptr) {
          std::copy_n(frame_mean, channels, call.frame_mean + frame * channels);
          std::copy_n(frame_square, channels, call.frame_square + frame * channels);
        }
        continue;
      }
      const double count = seen + static_cast<double>(t + 1);
      call.counts[frame] = count;
      double* mean = call.means + frame * channels;
      double* square = call.squares + frame * channels;
      for (std::size_t c = 0; c < channels; ++c) {
        mean_sum[c] += frame_mean[c];
        square_sum[c] += frame_square[c];
        mean[c] = mean_sum[c] / count;
        square[c] = square_sum[c] / count;
        const double variance = square[c] - mean[c] * mean[c];
        scales[c] = static_cast<double>(call.weight[c]) * inverse_spread(variance, call.eps);
      }
      centre.fill([&](std::size_t c) { return mean[c]; });
      scale.fill([&](std::size_t c) { return scales[c]; });
      shift.fill([&](std::size_t c) { return static_cast<double>(call.bias[c]) + (centre[c] - mean[c]) * scales[c]; });
      T* y = static_cast<T*>(call.y) + frame * length;
      for_each_vector(length, plan.stride, [&](std::size_t k, std::size_t place, const auto& lanes) {
        const Real off = load(p + k, lanes) - centre.at(place, lanes);
        store(y + k, off * scale.at(place, lanes) + shift.at(place, lanes), lanes);
      });
    }
  }
}

// Writes dx of one frame: dp = dy scale + (p - centre) slant + level, shared out over its windows, d_activated, and the
// slope.
template <class T>
class Spread {
 public:
  Spread(const NormBackward& call, const Plan& plan)
      : centre(plan), scale(plan), slant(plan), level(plan), call_(call), plan_(plan), pairs_(plan),
        pooled_(plan.pooled_width * plan.channels + kWidth), row_(plan.width * plan.channels + 2 * kWidth) {}

  void run(std::size_t frame, bool moments) {
    const std::size_t channels = plan_.channels;
    const std::size_t at = frame * plan_.pixels * channels;
    const std::size_t at_pooled = frame * plan_.pooled_pixels * channels;
    const T* p = frame_of<T>(call_.values, at_pooled);
    const T* dy = frame_of<T>(call_.dy, at_pooled);
    const T* a = frame_of<T>(call_.activated, at);
    const T* d_a = frame_of<T>(call_.d_activated, at);
    T* dx = frame_of<T>(call_.dx, at);
    const float share = 1.0F / static_cast<float>(plan_.window_height * plan_.window_width);
    const std::size_t windows = plan_.pools ? plan_.height / plan_.window_height * plan_.window_height : plan_.height;
    const float* d_row = plan_.window_width > 1 ? row_.data() : pooled_.data();
    for (std::size_t y = 0; y < plan_.height; ++y) {
      const std::size_t length = plan_.row_pixels(y) * channels;
      const std::size_t start = y * plan_.width * channels;
      const bool inside = y < windows;
      if (inside && y % plan_.window_height == 0) {
        const std::size_t from = y / plan_.window_height * plan_.pooled_width * channels;
        const std::size_t pooled_length = plan_.pools ? plan_.pooled_width * channels : length;
        for_each_vector(pooled_length, plan_.stride, [&](std::size_t k, std::size_t place, const auto& lanes) {
          Real d{};
          if (dy != nullptr) d = load(dy + from + k, lanes) * scale.at(place, lanes);
          if (moments) {
            d = d + ((load(p + from + k, lanes) - centre.at(place, lanes)) * slant.at(place, lanes) +
                     level.at(place, lanes));
          }
          store(pooled_.data() + k, d * share, lanes);
        });
        if (plan_.window_width > 1) widen_row();
      }
      const T* row_a = a == nullptr ? nullptr : a + start;
      if (d_a == nullptr) write_row<false>(inside ? d_row : nullptr, nullptr, row_a, dx + start, length);
      else write_row<true>(inside ? d_row : nullptr, d_a + start, row_a, dx + start, length);
    }
  }

  Pattern centre, scale, slant, level;

 private:
  template <bool HasActivated>
  void write_row(const float* d_row, const T* d_a, const T* a, T* dx, std::size_t length) const {
    if (a == nullptr) write_row<HasActivated, false>(d_row, d_a, a, dx, length);
    else write_row<HasActivated, true>(d_row, d_a, a, dx, length);
  }
  template <bool HasActivated, bool HasSlope>
  void write_row(const float* d_row, const T* d_a, const T* a, T* dx, std::size_t length) const {
    const float slope = call_.slope;
    for_each_vector(length, [=](std::size_t k, const auto& lanes) {
      Real d{};
      if (d_row != nullptr) d = load(d_row + k, lanes);
      if constexpr (HasActivated) d = d + load(d_a + k, lanes);
      if constexpr (HasSlope) d = leaky(d, load(a + k, lanes), slope);
      store(dx + k, d, lanes);
    });
  }

  // What lies beyond the last window of a row stays 0.
  void widen_row() {
    const std::size_t channels = plan_.channels;
#ifdef __AVX512F__
    if (pairs_.fit) {
      const std::size_t length = plan_.pooled_width * channels;
      for (std::size_t k = 0; k < length; k += kWidth) pairs_.twice(pooled_.data() + k, row_.data() + 2 * k);
      // A pixel without a pair has no window.
      std::fill_n(row_.data() + 2 * length, plan_.width * channels - 2 * length, 0.0F);
      return;
    }
#endif
    for (std::size_t x = 0; x < plan_.pooled_width; ++x) {
      float* to = row_.data() + x * plan_.window_width * channels;
      for_each_vector(channels, [&](std::size_t c, const auto& lanes) {
        const Real d = load(pooled_.data() + x * channels + c, lanes);
        for (std::size_t n = 0; n < plan_.window_width; ++n) store(to + n * channels + c, d, lanes);
      });
    }
  }

  const NormBackward& call_;
  const Plan& plan_;
  const NarrowPairs pairs_;
  Buffer<float> pooled_, row_;
};

template <class T>
void backward(const NormBackward& call, double* d_weight_bias, std::size_t first, std::size_t last) {
  const Plan plan(call.shape);
  const std::size_t channels = plan.channels;
  const std::size_t length = plan.pooled_pixels * channels;
  const double share = 1.0 / static_cast<double>(plan.pooled_pixels);
  const bool normalises = call.weight != nullptr;
  const bool moments = normalises ? !call.given : call.d_means != nullptr;
  Spread<T> spread(call, plan);
  ChannelSums<2> sums(plan);
  // The gradients of a frame's moments: of all later states, each divided by its count.
  std::vector<double> d_frame_mean(channels);
  std::vector<double> d_frame_square(channels);
  std::vector<double> scales(channels, 1.0);
  spread.scale.fill([](std::size_t) { return 1.0; });
  for (std::size_t b = first; b < last; ++b) {
    std::fill(d_frame_mean.begin(), d_frame_mean.end(), 0.0);
    std::fill(d_frame_square.begin(), d_frame_square.end(), 0.0);
    const double seen = call.frames == nullptr ? 0.0 : call.frames[b];
    for (std::size_t t = plan.steps; t-- > 0;) {
      const std::size_t frame = t * plan.batch + b;
      const double* mean = call.means == nullptr ? nullptr : call.means + frame * channels;
      if (mean != nullptr) spread.centre.fill([&](std::size_t c) { return mean[c]; });
      const double* d_means = call.d_means == nullptr ? nullptr : call.d_means + frame * channels;
      const double* d_squares = call.d_squares == nullptr ? nullptr : call.d_squares + frame * channels;
      if (normalises) {
        if (call.dy != nullptr) {
          const T* p = static_cast<const T*>(call.values) + frame * length;
          const T* dy = static_cast<const T*>(call.dy) + frame * length;
          sums.run([&](std::size_t k, std::size_t place, const auto& lanes) {
            const Real d = load(dy + k, lanes);
            return ChannelSums<2>::Terms{{d, d * (load(p + k, lanes) - spread.centre.at(place, lanes))}};
          });
        }
        const double count = seen + static_cast<double>(t + 1);
        const double* square = call.squares + frame * channels;
        double* d_weight = d_weight_bias + 2 * b * channels;
        double* d_bias = d_weight + channels;
        for (std::size_t c = 0; c < channels; ++c) {
          const double weight = static_cast<double>(call.weight[c]);
          const double variance = square[c] - mean[c] * mean[c];
          const double inverse = inverse_spread(variance, call.eps);
          scales[c] = weight * inverse;
          const double d_y = sums[0][c];
          const double d_scale = sums[1][c] + (spread.centre[c] - mean[c]) * d_y;
          d_bias[c] += d_y;
          d_weight[c] += d_scale * inverse;
          double d_variance = -0.5 * d_scale * weight * inverse * inverse * inverse;
          if (variance < 0.0) d_variance = 0.0;
          const double d_mean = (d_means == nullptr ? 0.0 : d_means[c]) - scales[c] * d_y - 2.0 * mean[c] * d_variance;
          d_frame_mean[c] += d_mean / count;
          d_frame_square[c] += ((d_squares == nullptr ? 0.0 : d_squares[c]) + d_variance) / count;
        }
        spread.scale.fill([&](std::size_t c) { return scales[c]; });
      } else if (moments) {
        std::copy_n(d_means, channels, d_frame_mean.data());
        std::copy_n(d_squares, channels, d_frame_square.data());
      }
      if (moments) {
        spread.slant.fill([&](std::size_t c) { return 2.0 * share * d_frame_square[c]; });
        spread.level.fill([&](std::size_t c) {
          return share * (d_frame_mean[c] + 2.0 * spread.centre[c] * d_frame_square[c]);
        });
      } else if (normalises) {
        std::copy_n(d_frame_mean.data(), channels, call.d_given_mean + frame * channels);
        std::copy_n(d_frame_square.data(), channels, call.d_given_square + frame * channels);
      }
      if (call.dx != nullptr) spread.run(frame, moments);
    }
    if (call.d_mean == nullptr) continue;
    for (std::size_t c = 0; c < channels; ++c) {
      call.d_mean[b * channels + c] = seen * d_frame_mean[c];
      call.d_square[b * channels + c] = seen * d_frame_square[c];
    }
  }
}

}  // namespace

extern const NormKernels RLV2V_KERNELS;
const NormKernels RLV2V_KERNELS{{forward<float>, forward<Bf16>, forward<Half>},
                                {backward<float>, backward<Bf16>, backward<Half>}};

}  // namespace rlv2v

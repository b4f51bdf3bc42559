// Tests every instruction set of this CPU against the formulas of sequence_norm.h in f64, gradients against differences
// of them. Limits: rounding of the stored type, and of f32 in sums over a frame.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "formats.h"
#include "isa.h"
#include "norm/sequence_norm.h"

namespace {

using rlv2v::FloatType;
using rlv2v::NormBackward;
using rlv2v::NormForward;
using rlv2v::NormShape;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kBf16, FloatType::kF16};
constexpr double kF32 = 0x1p-24;
constexpr double kEps = 1e-3;
constexpr float kSlope = 0.25F;
// Channels that divide a vector, are divided by one, and neither; windows that leave a row or a column out.
constexpr NormShape kShapes[] = {{3, 2, 8, 4, 6, 2, 2}, {2, 1, 24, 2, 2, 2, 2}, {2, 3, 5, 7, 3, 2, 2},
                                 {3, 1, 3, 5, 4, 1, 1}, {1, 2, 16, 9, 5, 2, 1}, {2, 1, 2, 3, 37, 1, 2},
                                 {2, 2, 1, 1, 1, 1, 1}, {2, 1, 33, 3, 4, 3, 4}, {1, 1, 4, 13, 11, 1, 1}};

Format format_of(FloatType type) {
  return type == FloatType::kF32 ? kSingle : type == FloatType::kBf16 ? kBfloat16 : kFloat16;
}

std::size_t as_size(std::int64_t n) { return static_cast<std::size_t>(n); }

struct Sizes {
  explicit Sizes(const NormShape& s)
      : channels(as_size(s.channels)), batch(as_size(s.batch)), steps(as_size(s.steps)),
        pixels(as_size(s.height * s.width)),
        pooled_pixels(as_size((s.height / s.pool_height) * (s.width / s.pool_width))), frames(batch * steps),
        x(frames * pixels * channels), p(frames * pooled_pixels * channels), moments(frames * channels),
        state(batch * channels), window(static_cast<double>(s.pool_height * s.pool_width)),
        pools(s.pool_height * s.pool_width > 1) {}
  std::size_t channels, batch, steps, pixels, pooled_pixels, frames, x, p, moments, state;
  double window;
  bool pools;
};

// Returns the place in p of the window that holds an element of x, or false if none does.
bool window_of(const NormShape& s, std::size_t element, std::size_t& place) {
  const Sizes n(s);
  const std::size_t c = element % n.channels;
  const std::size_t pixel = element / n.channels % n.pixels;
  const std::size_t frame = element / n.channels / n.pixels;
  const std::size_t y = pixel / as_size(s.width) / as_size(s.pool_height);
  const std::size_t x = pixel % as_size(s.width) / as_size(s.pool_width);
  const std::size_t width = as_size(s.width / s.pool_width);
  if (y >= as_size(s.height / s.pool_height) || x >= width) return false;
  place = ((frame * n.pooled_pixels) + y * width + x) * n.channels + c;
  return true;
}

Doubles numbers(std::size_t count, std::uint64_t seed, double low, double high) {
  const Draws draws(seed);
  Doubles values(count);
  for (std::size_t k = 0; k < count; ++k) values[k] = low + (high - low) * draws.uniform(k);
  return values;
}

Floats to_floats(const Doubles& values) {
  Floats floats(values.size());
  std::transform(values.begin(), values.end(), floats.begin(), [](double x) { return static_cast<float>(x); });
  return floats;
}

Doubles to_doubles(const Array& array) {
  Doubles values(array.size());
  for (std::size_t k = 0; k < values.size(); ++k) values[k] = array[k];
  return values;
}

// What follows p, in f64.
struct Normalised {
  Doubles y, means, squares, frame_mean, frame_square;
};

struct Inputs {
  Inputs(const NormShape& s, std::uint64_t seed)
      : weight(to_floats(numbers(as_size(s.channels), seed, 0.5, 1.5))),
        bias(to_floats(numbers(as_size(s.channels), seed + 1, -1.0, 1.0))),
        frames(numbers(as_size(s.batch), seed + 2, 1.0, 5.0)),
        mean(numbers(as_size(s.batch * s.channels), seed + 3, -1.0, 1.0)), square(mean.size()) {
    const Doubles spread = numbers(mean.size(), seed + 4, 0.5, 2.0);
    for (std::size_t k = 0; k < mean.size(); ++k) square[k] = mean[k] * mean[k] + spread[k];
  }
  Floats weight, bias;
  Doubles frames, mean, square;
};

Normalised normalise(const NormShape& s, const Doubles& p, const Inputs& in, bool has_state, const Doubles* given_mean,
                     const Doubles* given_square) {
  const Sizes n(s);
  Normalised out{Doubles(n.p), Doubles(n.moments), Doubles(n.moments), Doubles(n.moments), Doubles(n.moments)};
  for (std::size_t b = 0; b < n.batch; ++b) {
    for (std::size_t c = 0; c < n.channels; ++c) {
      const std::size_t state = b * n.channels + c;
      const double seen = has_state ? in.frames[b] : 0.0;
      double mean_sum = has_state ? seen * in.mean[state] : 0.0;
      double square_sum = has_state ? seen * in.square[state] : 0.0;
      for (std::size_t t = 0; t < n.steps; ++t) {
        const std::size_t frame = t * n.batch + b;
        const std::size_t at = frame * n.channels + c;
        const auto place = [&](std::size_t pixel) { return (frame * n.pooled_pixels + pixel) * n.channels + c; };
        double sum = 0.0;
        double sum_of_squares = 0.0;
        for (std::size_t k = 0; k < n.pooled_pixels; ++k) {
          sum += p[place(k)];
          sum_of_squares += p[place(k)] * p[place(k)];
        }
        out.frame_mean[at] = sum / static_cast<double>(n.pooled_pixels);
        out.frame_square[at] = sum_of_squares / static_cast<double>(n.pooled_pixels);
        mean_sum += given_mean != nullptr ? (*given_mean)[at] : out.frame_mean[at];
        square_sum += given_square != nullptr ? (*given_square)[at] : out.frame_square[at];
        const double count = seen + static_cast<double>(t + 1);
        out.means[at] = mean_sum / count;
        out.squares[at] = square_sum / count;
        const double variance = std::max(out.squares[at] - out.means[at] * out.means[at], 0.0);
        const double scale = static_cast<double>(in.weight[c]) / std::sqrt(variance + kEps);
        for (std::size_t k = 0; k < n.pooled_pixels; ++k) {
          out.y[place(k)] = (p[place(k)] - out.means[at]) * scale + static_cast<double>(in.bias[c]);
        }
      }
    }
  }
  return out;
}

void check_near(const Doubles& got, const Doubles& expected, double limit) {
  CHECK(got.size() == expected.size());
  for (std::size_t k = 0; k < got.size(); ++k) {
    CHECK(std::fabs(got[k] - expected[k]) <= limit * std::max(1.0, std::fabs(expected[k])));
  }
}

struct Outputs {
  Outputs(FloatType type, const NormShape& s)
      : activated(format_of(type), Sizes(s).x), pooled(format_of(type), Sizes(s).pools ? Sizes(s).p : 0),
        y(format_of(type), Sizes(s).p), counts(Sizes(s).frames), means(Sizes(s).moments), squares(means),
        frame_mean(means), frame_square(means) {}
  bool operator==(const Outputs& o) const {
    return activated == o.activated && pooled == o.pooled && y == o.y && counts == o.counts && means == o.means &&
           squares == o.squares && frame_mean == o.frame_mean && frame_square == o.frame_square;
  }
  Array activated, pooled, y;
  Doubles counts, means, squares, frame_mean, frame_square;
};

// what: 1 residual, 2 state, 4 given moments, 8 normalise.
void forward_case(FloatType type, const NormShape& s, unsigned what) {
  const Sizes n(s);
  const Format format = format_of(type);
  Array x(format, n.x);
  Array residual(format, n.x);
  x.fill(1, -2.0, 3.0);
  residual.fill(2, -1.0, 1.0);
  const Inputs in(s, 3);
  const Doubles given_mean = numbers(n.moments, 8, -0.5, 0.5);
  Doubles given_square = numbers(n.moments, 9, 1.0, 2.0);
  const bool normalises = (what & 8U) != 0;
  const auto call = [&](Outputs& out, int threads) {
    const bool state = (what & 2U) != 0;
    const bool given_moments = (what & 4U) != 0;
    rlv2v::norm_forward({type, s, kSlope, kEps, x.data(), (what & 1U) != 0 ? residual.data() : nullptr,
                         normalises ? in.weight.data() : nullptr, normalises ? in.bias.data() : nullptr,
                         given_moments ? given_mean.data() : nullptr, given_moments ? given_square.data() : nullptr,
                         state ? in.frames.data() : nullptr, state ? in.mean.data() : nullptr,
                         state ? in.square.data() : nullptr, out.activated.data(), out.pooled.data(), out.y.data(),
                         out.counts.data(), out.means.data(), out.squares.data(),
                         normalises ? nullptr : out.frame_mean.data(), normalises ? nullptr : out.frame_square.data(),
                         threads});
  };
  Outputs out(type, s);
  call(out, 1);
  Outputs again(type, s);
  call(again, 3);
  CHECK(out.activated == again.activated && out.pooled == again.pooled && out.means == again.means);
  Doubles pooled(n.p);
  for (std::size_t k = 0; k < n.x; ++k) {
    double a = x[k] + ((what & 1U) != 0 ? residual[k] : 0.0);
    a = a > 0.0 ? a : a * static_cast<double>(kSlope);
    CHECK(std::fabs(out.activated[k] - a) <= format.rounding(a) + 2.0 * kF32 * std::fabs(a));
    std::size_t place = 0;
    if (window_of(s, k, place)) pooled[place] += out.activated[k] / n.window;
  }
  const Array& stored = n.pools ? out.pooled : out.activated;
  for (std::size_t k = 0; k < n.p; ++k) {
    CHECK(std::fabs(stored[k] - pooled[k]) <= format.rounding(pooled[k]) + 16.0 * kF32 * 3.0);
  }
  const bool given = (what & 4U) != 0;
  const Normalised right = normalise(s, to_doubles(stored), in, (what & 2U) != 0, given ? &given_mean : nullptr,
                                     given ? &given_square : nullptr);
  if (!normalises) {
    check_near(out.frame_mean, right.frame_mean, 4.0 * kF32);
    check_near(out.frame_square, right.frame_square, 16.0 * kF32);
    return;
  }
  check_near(out.means, right.means, 4.0 * kF32);
  check_near(out.squares, right.squares, 16.0 * kF32);
  check_near(to_doubles(out.y), right.y, format.unit() * (type == FloatType::kF32 ? 2048.0 : 2.0));
  for (std::size_t k = 0; k < n.frames; ++k) {
    const double seen = (what & 2U) != 0 ? in.frames[k % n.batch] : 0.0;
    CHECK(out.counts[k] == seen + static_cast<double>(k / n.batch + 1));
  }
}

// what: 2 state, 4 given moments, 8 normalise, 16 dy, 32 d_activated, 64 gradients of the moments.
void backward_case(FloatType type, const NormShape& s, unsigned what) {
  const Sizes n(s);
  const Format format = format_of(type);
  const bool state = (what & 2U) != 0;
  const bool given = (what & 4U) != 0;
  const bool normalises = (what & 8U) != 0;
  Array activated(format, n.x);
  Array values(format, n.p);
  Array dy(format, n.p);
  Array d_activated(format, n.x);
  activated.fill(11, -1.0, 2.0);
  values.fill(12, -1.0, 3.0);
  dy.fill(13, -1.0, 1.0);
  d_activated.fill(14, -1.0, 1.0);
  const Inputs in(s, 15);
  const Doubles p = to_doubles(values);
  const Doubles given_mean = numbers(n.moments, 16, -0.5, 0.5);
  const Doubles given_square = numbers(n.moments, 17, 1.0, 2.0);
  const Doubles d_means = numbers(n.moments, 18, -1.0, 1.0);
  const Doubles d_squares = numbers(n.moments, 19, -1.0, 1.0);

  const auto loss = [&](const Doubles& at, const Inputs& with, const Doubles& mean, const Doubles& square) {
    const Normalised out = normalise(s, at, with, state, given ? &mean : nullptr, given ? &square : nullptr);
    double sum = 0.0;
    for (std::size_t k = 0; k < n.p; ++k) sum += (what & 16U) != 0 ? dy[k] * (normalises ? out.y : at)[k] : 0.0;
    for (std::size_t k = 0; k < n.moments && (what & 64U) != 0; ++k) {
      sum += d_means[k] * (normalises ? out.means : out.frame_mean)[k];
      sum += d_squares[k] * (normalises ? out.squares : out.frame_square)[k];
    }
    return sum;
  };
  // The derivative of the loss by one number.
  const auto slope = [&](auto&& set) {
    constexpr double kStep = 1e-5;
    const auto moved = [&](double by) {
      Doubles at = p;
      Inputs with = in;
      Doubles mean = given_mean;
      Doubles square = given_square;
      set(at, with, mean, square, by);
      return loss(at, with, mean, square);
    };
    return (moved(kStep) - moved(-kStep)) / (2.0 * kStep);
  };

  const Normalised right = normalise(s, p, in, state, given ? &given_mean : nullptr, given ? &given_square : nullptr);
  Array dx(format, n.x);
  Floats d_weight(n.channels);
  Floats d_bias(n.channels);
  Doubles d_mean(n.state);
  Doubles d_square(n.state);
  Doubles d_given_mean(n.moments);
  Doubles d_given_square(n.moments);
  const auto call = [&](Array& to, int threads) {
    rlv2v::norm_backward({type, s, kSlope, kEps, activated.data(), values.data(),
                          normalises ? in.weight.data() : nullptr, state ? in.frames.data() : nullptr,
                          (normalises ? right.means : right.frame_mean).data(), right.squares.data(),
                          (what & 16U) != 0 ? dy.data() : nullptr, (what & 32U) != 0 ? d_activated.data() : nullptr,
                          (what & 64U) != 0 ? d_means.data() : nullptr, (what & 64U) != 0 ? d_squares.data() : nullptr,
                          given, to.data(), d_weight.data(), d_bias.data(), state ? d_mean.data() : nullptr,
                          state ? d_square.data() : nullptr, given ? d_given_mean.data() : nullptr,
                          given ? d_given_square.data() : nullptr, threads});
  };
  Array other(format, n.x);
  call(other, 3);
  const Floats d_weight_of_threads = d_weight;
  call(dx, 1);
  CHECK(dx == other && d_weight == d_weight_of_threads);

  Doubles dp(n.p);
  for (std::size_t k = 0; k < n.p; ++k) {
    dp[k] = slope([&](Doubles& at, Inputs&, Doubles&, Doubles&, double by) { at[k] += by; });
  }
  const double limit = 2e-5;  // of gradients of some 10
  for (std::size_t k = 0; k < n.x; ++k) {
    std::size_t place = 0;
    double d = window_of(s, k, place) ? dp[place] / n.window : 0.0;
    if ((what & 32U) != 0) d += d_activated[k];
    if (!(activated[k] > 0.0)) d *= static_cast<double>(kSlope);
    CHECK(std::fabs(dx[k] - d) <= format.rounding(d) + limit * std::max(1.0, std::fabs(d)));
  }
  const auto check = [&](double got, double expected) {
    CHECK(std::fabs(got - expected) <= 2.0 * limit * std::max(1.0, std::fabs(expected)));
  };
  for (std::size_t c = 0; c < n.channels && normalises; ++c) {
    // One f32 of the weight is too coarse a step: it is scaled in the loss instead, which is linear in both.
    Inputs with = in;
    with.weight[c] = 0.0F;
    const double without = loss(p, with, given_mean, given_square);
    check(static_cast<double>(d_weight[c]),
          (loss(p, in, given_mean, given_square) - without) / static_cast<double>(in.weight[c]));
    with = in;
    with.bias[c] += 1.0F;
    check(static_cast<double>(d_bias[c]),
          (loss(p, with, given_mean, given_square) - loss(p, in, given_mean, given_square)) /
              (static_cast<double>(with.bias[c]) - static_cast<double>(in.bias[c])));
  }
  for (std::size_t k = 0; k < n.state && state && normalises; ++k) {
    check(d_mean[k], slope([&](Doubles&, Inputs& with, Doubles&, Doubles&, double by) { with.mean[k] += by; }));
    check(d_square[k], slope([&](Doubles&, Inputs& with, Doubles&, Doubles&, double by) { with.square[k] += by; }));
  }
  for (std::size_t k = 0; k < n.moments && given; ++k) {
    check(d_given_mean[k], slope([&](Doubles&, Inputs&, Doubles& mean, Doubles&, double by) { mean[k] += by; }));
    check(d_given_square[k], slope([&](Doubles&, Inputs&, Doubles&, Doubles& square, double by) { square[k] += by; }));
  }
}

// A channel whose mean is large against its spread, over more pixels than one f32 sum takes.
void large_means() {
  const NormShape s{1, 1, 8, 90, 80, 1, 1};
  const Sizes n(s);
  const Floats x = to_floats(numbers(n.x, 21, 99.99, 100.01));
  Doubles mean(n.moments);
  Doubles square(n.moments);
  rlv2v::norm_forward({FloatType::kF32, s, 1.0F, kEps, x.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                       nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, mean.data(),
                       square.data(), 1});
  for (std::size_t c = 0; c < n.channels; ++c) {
    double right = 0.0;
    for (std::size_t k = c; k < n.x; k += n.channels) right += (static_cast<double>(x[k]) - 100.0) / 7200.0;
    double variance = 0.0;
    for (std::size_t k = c; k < n.x; k += n.channels) {
      const double off = static_cast<double>(x[k]) - 100.0 - right;
      variance += off * off / 7200.0;
    }
    CHECK(std::fabs(mean[c] - 100.0 - right) <= 1e-9);
    CHECK(std::fabs(square[c] - mean[c] * mean[c] - variance) <= 16.0 * kF32 * variance);
  }
}

// A flat frame has finite results; a NaN stays in its clip and channel.
void extremes() {
  const NormShape s{2, 2, 3, 4, 5, 1, 1};
  const Sizes n(s);
  const Inputs in(s, 31);
  for (const bool bad : {false, true}) {
    Floats x(n.x, 0.7F);
    if (bad) x[1] = std::numeric_limits<float>::quiet_NaN();  // frame 0 of clip 0, channel 1
    Outputs out(FloatType::kF32, s);
    rlv2v::norm_forward({FloatType::kF32, s, 1.0F, kEps, x.data(), nullptr, in.weight.data(), in.bias.data(), nullptr,
                         nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, out.y.data(), out.counts.data(),
                         out.means.data(), out.squares.data(), nullptr, nullptr, 1});
    for (std::size_t k = 0; k < n.p; ++k) {
      const bool touched = bad && k % n.channels == 1 && k / (n.channels * n.pixels) % n.batch == 0;
      CHECK(std::isnan(out.y[k]) == touched);
      CHECK(touched || std::fabs(out.y[k] - static_cast<double>(in.bias[k % n.channels])) <= 1e-6);
    }
  }
}

template <class Call>
bool refused(void (*run)(const Call&), Call call, void (*spoil)(Call&)) {
  spoil(call);
  return throws<std::invalid_argument>([&] { run(call); });
}

void refusals() {
  const NormShape s{2, 1, 3, 4, 4, 2, 2};
  const Sizes n(s);
  Floats x(n.x);
  const Inputs in(s, 41);
  Outputs out(FloatType::kF32, s);
  const NormForward forward{FloatType::kF32, s, 0.2F, kEps, x.data(), x.data(), in.weight.data(), in.bias.data(),
                            nullptr, nullptr, nullptr, nullptr, nullptr, out.activated.data(), out.pooled.data(),
                            out.y.data(), out.counts.data(), out.means.data(), out.squares.data(), nullptr, nullptr, 1};
  rlv2v::norm_forward(forward);
  using F = NormForward;
  void (*const bad_forward[])(F&) = {
      [](F& call) { call.x = nullptr; }, [](F& call) { call.activated = nullptr; },
      [](F& call) { call.pooled = nullptr; }, [](F& call) { call.bias = nullptr; },
      [](F& call) { call.y = nullptr; }, [](F& call) { call.squares = nullptr; },
      [](F& call) { call.frames = call.means; }, [](F& call) { call.given_mean = call.means; },
      [](F& call) { call.frame_mean = call.means; }, [](F& call) { call.type = static_cast<FloatType>(3); },
      [](F& call) { call.shape.steps = 0; }, [](F& call) { call.shape.batch = -1; },
      [](F& call) { call.shape.pool_width = 5; }, [](F& call) { call.shape.pool_height = call.shape.pool_width = 1; },
      [](F& call) { call.shape.batch = call.shape.height = std::int64_t{1} << 31; },
      [](F& call) { call.num_threads = 0; }};
  for (const auto spoil : bad_forward) CHECK(refused(&rlv2v::norm_forward, forward, spoil));
  const NormBackward backward{FloatType::kF32, s, 0.2F, kEps, out.activated.data(), out.pooled.data(),
                              in.weight.data(), nullptr, out.means.data(), out.squares.data(), out.y.data(), nullptr,
                              nullptr, nullptr, false, x.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                              1};
  rlv2v::norm_backward(backward);
  using B = NormBackward;
  void (*const bad_backward[])(B&) = {[](B& call) { call.values = nullptr; }, [](B& call) { call.means = nullptr; },
                                      [](B& call) { call.squares = nullptr; }, [](B& call) { call.given = true; },
                                      [](B& call) { call.d_means = call.means; },
                                      [](B& call) { call.d_mean = call.d_square = const_cast<double*>(call.means); },
                                      [](B& call) { call.shape.channels = 0; }};
  for (const auto spoil : bad_backward) CHECK(refused(&rlv2v::norm_backward, backward, spoil));
  NormForward empty{};
  empty.shape = {1, 0, 1, 1, 1, 1, 1};
  empty.num_threads = 1;
  rlv2v::norm_forward(empty);
}

}  // namespace

int main() {
  for (const rlv2v::Isa set : rlv2v::available_isas()) {
    rlv2v::choose_isa(rlv2v::isa_name(set));
    for (const FloatType type : kTypes) {
      for (const NormShape& shape : kShapes) {
        for (const unsigned what : {0U, 1U, 8U, 9U, 11U, 12U, 15U}) forward_case(type, shape, what);
        for (const unsigned what : {16U, 32U, 48U, 112U, 24U, 56U, 58U, 122U, 88U, 28U, 126U}) {
          backward_case(type, shape, what);
        }
      }
    }
    large_means();
    extremes();
  }
  refusals();
  return 0;
}

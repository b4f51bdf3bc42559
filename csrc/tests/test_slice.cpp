// Tests every instruction set of this CPU against the formulas of slice.h in f64. Limits: the kernels add some thirty
// products of numbers of unit size in f32, and an 8-bit value may fall on the other side of one half.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "bilateral/slice.h"
#include "check.h"
#include "isa.h"

namespace {

using rlv2v::SliceBackward;
using rlv2v::SliceForward;
using rlv2v::SliceFrame;
using rlv2v::SliceShape;
using Numbers = std::vector<float>;

constexpr double kLimit = 64.0 * 0x1p-24;
constexpr SliceShape kShapes[] = {{2, 6, 3, 4, 13, 37},  {1, 1, 1, 1, 5, 3},    {3, 8, 2, 5, 1, 1}, {1, 2, 7, 9, 4, 6},
                                  {1, 8, 4, 4, 64, 64}, {2, 3, 1, 2, 2, 100}, {1, 5, 3, 1, 40, 17}};

std::size_t size(std::initializer_list<std::int64_t> lengths) {
  std::size_t product = 1;
  for (const std::int64_t length : lengths) product *= static_cast<std::size_t>(length);
  return product;
}

Numbers random_numbers(std::size_t count, float low, float high, unsigned seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> draw(low, high);
  Numbers numbers(count);
  for (float& number : numbers) number = draw(rng);
  return numbers;
}

// A place on an axis: two cells, the way between them, and whether it lies inside.
struct Place {
  std::int64_t low, high;
  double fraction;
  bool inside;
  double weight(std::int64_t cell) const {
    return (cell == low ? 1.0 - fraction : 0.0) + (cell == high && high != low ? fraction : 0.0);
  }
};

Place place_at(double place, std::int64_t cells) {
  const double last = static_cast<double>(cells - 1);
  const double clamped = std::min(std::max(place, 0.0), last);
  const auto low = static_cast<std::int64_t>(clamped);
  return {low, std::min(low + 1, cells - 1), clamped - static_cast<double>(low), place > 0.0 && place < last};
}

Place pixel_at(std::int64_t pixel, std::int64_t pixels, std::int64_t cells) {
  return place_at((static_cast<double>(pixel) + 0.5) * static_cast<double>(cells) / static_cast<double>(pixels) - 0.5,
                  cells);
}

struct Arrays {
  explicit Arrays(const SliceShape& s)
      : shape(s),
        plane(size({s.height, s.width})),
        cells(size({s.bins, s.grid_height, s.grid_width})),
        grid(random_numbers(size({s.batch, 12}) * cells, -1.0F, 1.0F, 1)),
        guide(random_numbers(size({s.batch}) * plane, -0.3F, 1.3F, 2)),
        frames(random_numbers(size({s.batch, 3}) * plane, -1.0F, 1.0F, 3)),
        d_out(random_numbers(size({s.batch, 3}) * plane, -1.0F, 1.0F, 4)) {}

  SliceShape shape;
  std::size_t plane, cells;
  Numbers grid, guide, frames, d_out;
};

struct Expected {
  std::vector<double> out, d_grid, d_guide, d_frames;
};

// Every cell of every pixel, one after the other.
Expected oracle(const Arrays& a, const std::vector<double>& guide, const std::vector<double>& frames) {
  const SliceShape& s = a.shape;
  Expected e{std::vector<double>(a.frames.size()), std::vector<double>(a.grid.size()),
             std::vector<double>(a.guide.size()), std::vector<double>(a.frames.size())};
  for (std::int64_t n = 0; n < s.batch; ++n) {
    for (std::int64_t y = 0; y < s.height; ++y) {
      for (std::int64_t x = 0; x < s.width; ++x) {
        const std::size_t pixel = size({y, s.width}) + static_cast<std::size_t>(x);
        const std::size_t at = size({n}) * a.plane + pixel;
        const Place h = pixel_at(x, s.width, s.grid_width);
        const Place v = pixel_at(y, s.height, s.grid_height);
        const Place b = place_at(guide[at] * static_cast<double>(s.bins) - 0.5, s.bins);
        for (std::size_t k = 0; k < 12; ++k) {
          const std::size_t out = (size({n, 3}) + k / 4) * a.plane + pixel;
          const std::size_t in = (size({n, 3}) + k % 4) * a.plane + pixel;
          const double colour = k % 4 == 3 ? 1.0 : frames[in];
          const double d = static_cast<double>(a.d_out[out]);
          for (std::int64_t bin = 0; bin < s.bins; ++bin) {
            for (std::int64_t row = 0; row < s.grid_height; ++row) {
              for (std::int64_t column = 0; column < s.grid_width; ++column) {
                const double across = v.weight(row) * h.weight(column);
                const std::size_t cell = (size({n, 12}) + k) * a.cells + size({bin, s.grid_height, s.grid_width}) +
                                         size({row, s.grid_width}) + static_cast<std::size_t>(column);
                const double value = static_cast<double>(a.grid[cell]) * across;
                e.out[out] += value * b.weight(bin) * colour;
                e.d_grid[cell] += across * b.weight(bin) * colour * d;
                if (k % 4 != 3) e.d_frames[in] += value * b.weight(bin) * d;
                const double slope = b.inside ? (bin == b.high ? 1.0 : bin == b.low ? -1.0 : 0.0) : 0.0;
                e.d_guide[at] += value * slope * static_cast<double>(s.bins) * colour * d;
              }
            }
          }
        }
      }
    }
  }
  return e;
}

void check_near(const Numbers& got, const std::vector<double>& expected, double scale) {
  CHECK(got.size() == expected.size());
  for (std::size_t k = 0; k < got.size(); ++k) {
    CHECK(std::fabs(static_cast<double>(got[k]) - expected[k]) <= kLimit * scale * std::max(1.0, std::fabs(expected[k])));
  }
}

void values_and_gradients() {
  for (const SliceShape& shape : kShapes) {
    const Arrays a(shape);
    const Expected e = oracle(a, {a.guide.begin(), a.guide.end()}, {a.frames.begin(), a.frames.end()});
    for (const int threads : {1, 3}) {
      Numbers out(a.frames.size(), 9.0F);
      rlv2v::slice_forward({shape, a.grid.data(), a.guide.data(), a.frames.data(), out.data(), threads});
      check_near(out, e.out, 1.0);
      Numbers d_grid(a.grid.size(), 9.0F);
      Numbers d_guide(a.guide.size(), 9.0F);
      Numbers d_frames(a.frames.size(), 9.0F);
      rlv2v::slice_backward({shape, a.grid.data(), a.guide.data(), a.frames.data(), a.d_out.data(), d_grid.data(),
                             d_guide.data(), d_frames.data(), threads});
      check_near(d_grid, e.d_grid, static_cast<double>(shape.height));
      check_near(d_guide, e.d_guide, static_cast<double>(shape.bins) * 4.0);
      check_near(d_frames, e.d_frames, 1.0);
      Numbers only(a.grid.size(), 9.0F);
      rlv2v::slice_backward({shape, a.grid.data(), a.guide.data(), a.frames.data(), a.d_out.data(), only.data(),
                             nullptr, nullptr, threads});
      CHECK(only == d_grid);
    }
  }
}

void frames_of_bytes(SliceShape shape, std::int64_t num_around) {
  shape.batch = 1;
  Arrays a(shape);
  const auto columns = static_cast<std::size_t>(5 + num_around);
  Numbers curve = random_numbers(3 * columns, -0.6F, 0.6F, 6);
  for (std::size_t k = 0; k < 3 + static_cast<std::size_t>(num_around); ++k) curve[k] *= 0.4F;
  curve[columns - 2] = 0.5F;  // of the first row, whose factor does not count
  curve[columns - 1] = 7.0F;
  const std::int64_t around_height = 1 + shape.height / 3;
  const std::int64_t around_width = 2 + shape.width / 5;
  const std::size_t cells = size({around_height, around_width});
  const Numbers around = random_numbers(size({num_around}) * cells, -1.0F, 1.0F, 7);
  std::mt19937 rng(5);
  std::vector<std::uint8_t> in(3 * a.plane);
  for (std::uint8_t& value : in) value = static_cast<std::uint8_t>(rng());
  std::vector<double> guide(a.plane);
  std::vector<double> colours(3 * a.plane);
  for (std::size_t pixel = 0; pixel < a.plane; ++pixel) {
    for (std::size_t c = 0; c < 3; ++c) colours[c * a.plane + pixel] = in[3 * pixel + c] / 127.5 - 1.0;
    const auto number = static_cast<std::int64_t>(pixel);
    const Place y = pixel_at(number / shape.width, shape.height, around_height);
    const Place x = pixel_at(number % shape.width, shape.width, around_width);
    for (std::size_t j = 0; j < 3; ++j) {
      const float* row = curve.data() + columns * j;
      double value = static_cast<double>(row[columns - 2]);
      for (std::size_t c = 0; c < 3; ++c) value += static_cast<double>(row[c]) * colours[c * a.plane + pixel];
      for (std::int64_t k = 0; k < num_around; ++k) {
        double near = 0.0;
        for (std::int64_t v = 0; v < around_height; ++v) {
          for (std::int64_t u = 0; u < around_width; ++u) {
            near += y.weight(v) * x.weight(u) *
                    static_cast<double>(around[static_cast<std::size_t>((k * around_height + v) * around_width + u)]);
          }
        }
        value += static_cast<double>(row[3 + k]) * near;
      }
      guide[pixel] += j == 0 ? value : static_cast<double>(row[columns - 1]) * std::max(value, 0.0);
    }
  }
  const std::vector<double> exact = oracle(a, guide, colours).out;
  for (const int threads : {1, 2}) {
    std::vector<std::uint8_t> out(in.size());
    rlv2v::slice_frame({shape, a.grid.data(), curve.data(), 3, around.data(), num_around, around_height, around_width,
                        in.data(), out.data(), threads});
    for (std::size_t pixel = 0; pixel < a.plane; ++pixel) {
      for (std::size_t c = 0; c < 3; ++c) {
        const double value = 127.5 * (std::min(std::max(exact[c * a.plane + pixel], -1.0), 1.0) + 1.0);
        CHECK(std::fabs(static_cast<double>(out[3 * pixel + c]) - value) <= 0.5 + 1e-3);
      }
    }
  }
}

// What is not finite stays at its pixels, and reads and writes nothing beyond the arrays.
void not_finite() {
  const SliceShape shape{1, 6, 3, 4, 5, 37};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {nan, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    Arrays a(shape);
    a.guide[7] = static_cast<float>(bad);
    a.frames[20] = static_cast<float>(bad);
    Numbers out(a.frames.size());
    rlv2v::slice_forward({shape, a.grid.data(), a.guide.data(), a.frames.data(), out.data(), 1});
    for (std::size_t k = 0; k < out.size(); ++k) {
      const std::size_t pixel = k % a.plane;
      CHECK(std::isfinite(out[k]) == !(pixel == 20 || (pixel == 7 && std::isnan(bad))));
    }
    const Numbers curve(5, static_cast<float>(bad));
    std::vector<std::uint8_t> bytes(3 * a.plane, 100);
    rlv2v::slice_frame({shape, a.grid.data(), curve.data(), 1, nullptr, 0, 0, 0, bytes.data(), bytes.data(), 1});
    const Numbers around(6, static_cast<float>(bad));
    const Numbers wide(6, 0.2F);
    rlv2v::slice_frame({shape, a.grid.data(), wide.data(), 1, around.data(), 1, 2, 3, bytes.data(), bytes.data(), 1});
  }
}

template <class Call>
bool refused(void (*function)(const Call&), Call call, const std::function<void(Call&)>& spoil) {
  spoil(call);
  return throws<std::invalid_argument>([&] { function(call); });
}

void refusals() {
  const SliceShape shape = kShapes[0];
  Arrays a(shape);
  Numbers out(a.frames.size());
  std::vector<std::uint8_t> bytes(3 * a.plane);
  const SliceForward forward{shape, a.grid.data(), a.guide.data(), a.frames.data(), out.data(), 1};
  for (const auto member : {&SliceForward::grid, &SliceForward::guide, &SliceForward::frames}) {
    CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [&](SliceForward& call) { call.*member = nullptr; }));
  }
  CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [](SliceForward& call) { call.out = nullptr; }));
  CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [](SliceForward& call) { call.num_threads = 0; }));
  for (const auto member : {&SliceShape::bins, &SliceShape::grid_height, &SliceShape::grid_width, &SliceShape::height,
                            &SliceShape::width}) {
    for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{1} << 40}) {
      CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [&](SliceForward& call) { call.shape.*member = bad; }));
    }
  }
  CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [](SliceForward& call) { call.shape.bins = 9; }));
  CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [](SliceForward& call) { call.shape.batch = -1; }));
  CHECK(refused<SliceForward>(&rlv2v::slice_forward, forward, [](SliceForward& call) {
    call.shape.batch = call.shape.height = call.shape.width = std::int64_t{1} << 24;
  }));
  const SliceBackward backward{shape, a.grid.data(), a.guide.data(), a.frames.data(), a.d_out.data(), out.data(),
                               nullptr, nullptr, 1};
  CHECK(refused<SliceBackward>(&rlv2v::slice_backward, backward, [](SliceBackward& call) { call.d_out = nullptr; }));
  const SliceFrame frame{{1, 6, 3, 4, 13, 37}, a.grid.data(), out.data(), 1, out.data(), 1, 2, 3, bytes.data(),
                         bytes.data(), 1};
  for (const std::int64_t bad : {std::int64_t{-1}, rlv2v::kMaxAround + 1}) {
    CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [&](SliceFrame& call) { call.num_around = bad; }));
  }
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.around = nullptr; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.around_height = 0; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.around_width = 0; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.shape.batch = 2; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.num_curves = 0; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.curve = nullptr; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.frame = nullptr; }));
  CHECK(refused<SliceFrame>(&rlv2v::slice_frame, frame, [](SliceFrame& call) { call.out = nullptr; }));
  rlv2v::slice_forward({{0, 1, 1, 1, 1, 1}, nullptr, nullptr, nullptr, nullptr, 1});
}

}  // namespace

int main() {
  for (const rlv2v::Isa set : rlv2v::available_isas()) {
    rlv2v::choose_isa(rlv2v::isa_name(set));
    values_and_gradients();
    for (const SliceShape& shape : kShapes) {
      for (const std::int64_t num_around : {0, 1, 4}) frames_of_bytes(shape, num_around);
    }
    not_finite();
  }
  refusals();
  return 0;
}

// The kernels of slice.h, compiled once for each instruction set under the name RLV2V_KERNELS. Products and sums may be
// fused where the set can. Everything else is in an unnamed namespace: code of one set must not be linked into another.
//
// In a row between two columns of cells, a coefficient is a + f d by the guide and p + x q by the place: four tables of
// the bins, which fit a register and are looked up by a permutation. So a pixel costs 48 look-ups and 36 + 9 products.
#include <array>
#include <cstring>
#include <vector>

#include "bilateral/slice.h"
#include "vector.h"

namespace rlv2v {
namespace {

constexpr std::size_t kBins = kMaxBins;
constexpr std::size_t kCoefficients = 12;
typedef std::int32_t Ints __attribute__((vector_size(kWidth * sizeof(std::int32_t))));

// Of one coefficient, for every bin: its value, and by how much the next bin's is larger. Padded so that a register's
// width may be read from the start of `larger`.
struct Table {
  float value[kBins];
  float larger[kBins];
};
using Tables = std::array<Table, kCoefficients>;
struct alignas(64) Column {
  Tables tables;
  float padding[16];
};

inline Real look_up(const float* table, Ints bin) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)bin, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)bin);
#else
  Real values{};
  for (std::size_t k = 0; k < kWidth; ++k) values[k] = table[bin[k] & static_cast<int>(kBins - 1)];
  return values;
#endif
}

// NaN stays NaN.
inline Real clamped_between(Real x, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(set(high), _mm512_max_ps(set(low), x));
#elif defined(__AVX2__)
  return _mm256_min_ps(set(high), _mm256_max_ps(set(low), x));
#else
  const Real above = x < low ? set(low) : x;
  return above > high ? set(high) : above;
#endif
}

struct Colour {
  Real c[3];
};

// Where a guide lies between two bins.
struct Slot {
  Slot(Real guide, float bins) {
    place = guide * bins - 0.5F;
    const Real inside = clamped_between(place, 0.0F, bins - 1.0F);
    bin = __builtin_convertvector(inside, Ints);
    fraction = inside - __builtin_convertvector(bin, Real);
    bin &= static_cast<int>(kBins - 1);  // what a NaN became
  }
  Real place, fraction;
  Ints bin;
};

struct Coefficient {
  Real value, slope;  // slope: by the place among the bins
};

// The coefficients at a place x of the way from one column of cells to the next, `step` further.
inline Coefficient coefficient(const Table& left, const Table& step, const Slot& slot, Real x) {
  const Real slope = look_up(left.larger, slot.bin) + x * look_up(step.larger, slot.bin);
  const Real value = look_up(left.value, slot.bin) + x * look_up(step.value, slot.bin);
  return {value + slot.fraction * slope, slope};
}

inline Colour transformed(const Column& left, const Column& step, const Slot& slot, Real x, const Colour& colour) {
  Colour out;
  for (std::size_t c = 0; c < 3; ++c) {
    out.c[c] = coefficient(left.tables[4 * c + 3], step.tables[4 * c + 3], slot, x).value;
    for (std::size_t k = 0; k < 3; ++k) {
      out.c[c] += coefficient(left.tables[4 * c + k], step.tables[4 * c + k], slot, x).value * colour.c[k];
    }
  }
  return out;
}

// The grid's cells at one row of pixels: between two rows of cells.
class GridRow {
 public:
  explicit GridRow(const SliceShape& shape)
      : bins_(static_cast<std::size_t>(shape.bins)),
        height_(static_cast<std::size_t>(shape.grid_height)),
        width_(static_cast<std::size_t>(shape.grid_width)),
        columns_(width_),
        steps_(width_) {
    std::memset(static_cast<void*>(columns_.data()), 0, width_ * sizeof(Column));
    std::memset(static_cast<void*>(steps_.data()), 0, width_ * sizeof(Column));
  }

  // grid is that of one frame, (12, bins, height, width).
  void interpolate(const float* grid, const SliceAxis& y, std::size_t row) {
    const SliceAxis::Segment& between = y.segments[y.segment[row]];
    const float fraction = y.fraction[row];
    for (std::size_t k = 0; k < kCoefficients; ++k) {
      for (std::size_t bin = 0; bin < bins_; ++bin) {
        const float* cells = grid + (k * bins_ + bin) * height_ * width_;
        const float* low = cells + between.low * width_;
        const float* high = cells + between.high * width_;
        for (std::size_t x = 0; x < width_; ++x) {
          columns_[x].tables[k].value[bin] = low[x] + fraction * (high[x] - low[x]);
        }
      }
    }
    for (Column& column : columns_) {
      for (Table& table : column.tables) {
        for (std::size_t bin = 0; bin + 1 < bins_; ++bin) table.larger[bin] = table.value[bin + 1] - table.value[bin];
      }
    }
    for (std::size_t x = 0; x < width_; ++x) {
      const Column& next = columns_[x + 1 < width_ ? x + 1 : x];
      for (std::size_t k = 0; k < kCoefficients; ++k) {
        for (std::size_t bin = 0; bin < bins_; ++bin) {
          steps_[x].tables[k].value[bin] = next.tables[k].value[bin] - columns_[x].tables[k].value[bin];
          steps_[x].tables[k].larger[bin] = next.tables[k].larger[bin] - columns_[x].tables[k].larger[bin];
        }
      }
    }
  }

  const Column& left(const SliceAxis::Segment& segment) const { return columns_[segment.low]; }
  const Column& step(const SliceAxis::Segment& segment) const { return steps_[segment.low]; }

 private:
  std::size_t bins_, height_, width_;
  std::vector<Column> columns_, steps_;
};

// Calls visit(x, lanes) for every vector of a segment's pixels; the last has some lanes only.
template <class Visit>
inline void for_each_vector(const SliceAxis::Segment& segment, const Visit& visit) {
  std::size_t x = segment.begin;
  for (; x + kWidth <= segment.end; x += kWidth) visit(x, AllLanes{});
  if (x < segment.end) visit(x, SomeLanes(segment.end - x));
}

template <class Lanes>
inline Colour load_colour(const float* planes, std::size_t plane, std::size_t at, const Lanes& lanes) {
  return {{load(planes + at, lanes), load(planes + plane + at, lanes), load(planes + 2 * plane + at, lanes)}};
}

template <class Lanes>
inline void store_colour(float* planes, std::size_t plane, std::size_t at, const Colour& colour, const Lanes& lanes) {
  for (std::size_t c = 0; c < 3; ++c) store(planes + c * plane + at, colour.c[c], lanes);
}

std::size_t grid_size(const SliceShape& shape) {
  return kCoefficients * static_cast<std::size_t>(shape.bins * shape.grid_height * shape.grid_width);
}

void forward(const SliceForward& call, const SlicePlan& plan, std::size_t first, std::size_t last) {
  const auto height = static_cast<std::size_t>(call.shape.height);
  const auto width = static_cast<std::size_t>(call.shape.width);
  const auto bins = static_cast<float>(call.shape.bins);
  const std::size_t plane = height * width;
  GridRow cells(call.shape);
  for (std::size_t row = first; row < last; ++row) {
    const std::size_t frame = row / height;
    const std::size_t y = row % height;
    cells.interpolate(call.grid + frame * grid_size(call.shape), plan.y, y);
    const float* guide = call.guide + row * width;
    const float* in = call.frames + frame * 3 * plane + y * width;
    float* out = call.out + frame * 3 * plane + y * width;
    for (const SliceAxis::Segment& segment : plan.x.segments) {
      const Column& left = cells.left(segment);
      const Column& step = cells.step(segment);
      for_each_vector(segment, [&](std::size_t x, const auto& lanes) {
        const Slot slot(load(guide + x, lanes), bins);
        const Real place = load(plan.x.fraction.data() + x, lanes);
        store_colour(out, plane, x, transformed(left, step, slot, place, load_colour(in, plane, x, lanes)), lanes);
      });
    }
  }
}

inline double sum(Real x) {
  double total = 0.0;
  for (std::size_t k = 0; k < kWidth; ++k) total += static_cast<double>(x[k]);
  return total;
}

// Adds the gradients of one row's coefficients to the cells around them, summed over the pixels of each segment.
// Every bin is visited with its weight, mostly 0: that is faster than scattering, and its order is always the same.
void add_grid_gradient(const SliceBackward& call, const SlicePlan& plan, std::size_t frame, std::size_t y,
                       std::vector<double>& d_grid) {
  const auto width = static_cast<std::size_t>(call.shape.width);
  const auto num_bins = static_cast<std::size_t>(call.shape.bins);
  const auto bins = static_cast<float>(call.shape.bins);
  const auto grid_width = static_cast<std::size_t>(call.shape.grid_width);
  const std::size_t cells = static_cast<std::size_t>(call.shape.grid_height) * grid_width;
  const std::size_t plane = static_cast<std::size_t>(call.shape.height) * width;
  const float* guide = call.guide + frame * plane + y * width;
  const float* in = call.frames + frame * 3 * plane + y * width;
  const float* d_out = call.d_out + frame * 3 * plane + y * width;
  const SliceAxis::Segment& rows = plan.y.segments[plan.y.segment[y]];
  const auto down = static_cast<double>(plan.y.fraction[y]);
  for (const SliceAxis::Segment& segment : plan.x.segments) {
    for (std::size_t bin = 0; bin < num_bins; ++bin) {
      for (std::size_t c = 0; c < 3; ++c) {
        Real total[4]{};  // of both columns, and of the right one
        Real of_right[4]{};
        for_each_vector(segment, [&](std::size_t x, const auto& lanes) {
          const Real place = clamped_between(load(guide + x, lanes) * bins - 0.5F, 0.0F, bins - 1.0F);
          const Real away = place - static_cast<float>(bin);
          const Real size = away < 0.0F ? -away : away;
          const Real weight = size >= 1.0F ? Real{} : 1.0F - size;  // a NaN stays one
          const Real d = weight * load(d_out + c * plane + x, lanes);  // 0 beyond the last lane
          const Real right = d * load(plan.x.fraction.data() + x, lanes);
          const Colour colour = load_colour(in, plane, x, lanes);
          for (std::size_t k = 0; k < 3; ++k) {
            total[k] += d * colour.c[k];
            of_right[k] += right * colour.c[k];
          }
          total[3] += d;
          of_right[3] += right;
        });
        for (std::size_t k = 0; k < 4; ++k) {
          const double right = sum(of_right[k]);
          const double left = sum(total[k]) - right;
          double* of_bin = d_grid.data() + ((4 * c + k) * num_bins + bin) * cells;
          of_bin[rows.low * grid_width + segment.low] += (1.0 - down) * left;
          of_bin[rows.low * grid_width + segment.high] += (1.0 - down) * right;
          of_bin[rows.high * grid_width + segment.low] += down * left;
          of_bin[rows.high * grid_width + segment.high] += down * right;
        }
      }
    }
  }
}

// The gradients of guide and frames in one row.
void pixel_gradients(const SliceBackward& call, const SlicePlan& plan, const GridRow& cells, std::size_t frame,
                     std::size_t y) {
  const auto width = static_cast<std::size_t>(call.shape.width);
  const auto bins = static_cast<float>(call.shape.bins);
  const std::size_t plane = static_cast<std::size_t>(call.shape.height) * width;
  const std::size_t row = frame * plane + y * width;
  const std::size_t row_of_planes = frame * 3 * plane + y * width;
  for (const SliceAxis::Segment& segment : plan.x.segments) {
    const Column& left = cells.left(segment);
    const Column& step = cells.step(segment);
    for_each_vector(segment, [&](std::size_t x, const auto& lanes) {
      const Slot slot(load(call.guide + row + x, lanes), bins);
      const Real place = load(plan.x.fraction.data() + x, lanes);
      const Colour colour = load_colour(call.frames + row_of_planes, plane, x, lanes);
      const Colour d_out = load_colour(call.d_out + row_of_planes, plane, x, lanes);
      Colour d_colour{};
      Real d_place{};
      for (std::size_t c = 0; c < 3; ++c) {
        const Coefficient bias = coefficient(left.tables[4 * c + 3], step.tables[4 * c + 3], slot, place);
        Real slope = bias.slope;
        for (std::size_t k = 0; k < 3; ++k) {
          const Coefficient a = coefficient(left.tables[4 * c + k], step.tables[4 * c + k], slot, place);
          d_colour.c[k] += a.value * d_out.c[c];
          slope += a.slope * colour.c[k];
        }
        d_place += slope * d_out.c[c];
      }
      if (call.d_frames != nullptr) store_colour(call.d_frames + row_of_planes, plane, x, d_colour, lanes);
      if (call.d_guide != nullptr) {
        const Real outside = slot.place >= bins - 1.0F ? Real{} : d_place * bins;
        store(call.d_guide + row + x, slot.place <= 0.0F ? Real{} : outside, lanes);
      }
    });
  }
}

void backward(const SliceBackward& call, const SlicePlan& plan, std::size_t first, std::size_t last) {
  const auto height = static_cast<std::size_t>(call.shape.height);
  const std::size_t of_grid = grid_size(call.shape);
  GridRow cells(call.shape);
  std::vector<double> d_grid;
  for (std::size_t frame = first; frame < last; ++frame) {
    d_grid.assign(call.d_grid == nullptr ? 0 : of_grid, 0.0);
    for (std::size_t y = 0; y < height; ++y) {
      if (call.d_grid != nullptr) add_grid_gradient(call, plan, frame, y, d_grid);
      if (call.d_guide != nullptr || call.d_frames != nullptr) {
        cells.interpolate(call.grid + frame * of_grid, plan.y, y);
        pixel_gradients(call, plan, cells, frame, y);
      }
    }
    for (std::size_t k = 0; k < d_grid.size(); ++k) call.d_grid[frame * of_grid + k] = static_cast<float>(d_grid[k]);
  }
}

// The planes around, interpolated at the pixels of one row.
class AroundRow {
 public:
  explicit AroundRow(const SliceFrame& call)
      : call_(call),
        num_(static_cast<std::size_t>(call.num_around)),
        cells_(num_ > 0 ? static_cast<std::size_t>(call.around_width) : 0),
        stride_(static_cast<std::size_t>(call.shape.width) + kWidth),
        pixels_(num_ * stride_) {
    if (num_ > 0) plan_.emplace_back(call);
  }

  void interpolate(std::size_t row) {
    if (num_ == 0) return;
    const SlicePlan& plan = plan_.front();
    const SliceAxis::Segment& between = plan.y.segments[plan.y.segment[row]];
    const float down = plan.y.fraction[row];
    const std::size_t width = cells_.size();
    for (std::size_t k = 0; k < num_; ++k) {
      const float* plane = call_.around + k * static_cast<std::size_t>(call_.around_height) * width;
      const float* low = plane + between.low * width;
      const float* high = plane + between.high * width;
      for (std::size_t x = 0; x < width; ++x) cells_[x] = low[x] + down * (high[x] - low[x]);
      float* out = pixels_.data() + k * stride_;
      for (const SliceAxis::Segment& segment : plan.x.segments) {
        const float left = cells_[segment.low];
        const float step = cells_[segment.high] - left;
        for (std::size_t x = segment.begin; x < segment.end; ++x) out[x] = left + plan.x.fraction[x] * step;
      }
    }
  }

  // The guide of a vector of pixels from x on, of this colour.
  Real guide(const Colour& colour, std::size_t x) const {
    Real around[kMaxAround];
    for (std::size_t k = 0; k < num_; ++k) around[k] = load(pixels_.data() + k * stride_ + x, AllLanes{});
    Real guide{};
    for (std::int64_t j = 0; j < call_.num_curves; ++j) {
      const float* curve = call_.curve + static_cast<std::int64_t>(5 + num_) * j;
      const float* end = curve + 3 + num_;  // the constant, and the factor
      Real value = curve[0] * colour.c[0] + (curve[1] * colour.c[1] + (curve[2] * colour.c[2] + end[0]));
      for (std::size_t k = 0; k < num_; ++k) value += curve[3 + k] * around[k];
      guide += j == 0 ? value : end[1] * (value < 0.0F ? Real{} : value);
    }
    return guide;
  }

 private:
  const SliceFrame& call_;
  std::size_t num_;
  std::vector<SlicePlan> plan_;  // none without planes
  std::vector<float> cells_;
  std::size_t stride_;
  std::vector<float> pixels_;
};

void frame(const SliceFrame& call, const SlicePlan& plan, std::size_t first, std::size_t last) {
  const auto width = static_cast<std::size_t>(call.shape.width);
  const auto bins = static_cast<float>(call.shape.bins);
  GridRow cells(call.shape);
  AroundRow around(call);
  // Whole vectors are read and written, the last of them beyond the row.
  const std::size_t plane = width + kWidth;
  std::vector<float> planes(3 * plane);
  std::vector<std::uint8_t> bytes(3 * plane);
  for (std::size_t y = first; y < last; ++y) {
    cells.interpolate(call.grid, plan.y, y);
    around.interpolate(y);
    const std::uint8_t* in = call.frame + 3 * y * width;
    for (std::size_t x = 0; x < width; ++x) {
      for (std::size_t c = 0; c < 3; ++c) planes[c * plane + x] = static_cast<float>(in[3 * x + c]);
    }
    for (const SliceAxis::Segment& segment : plan.x.segments) {
      const Column& left = cells.left(segment);
      const Column& step = cells.step(segment);
      // The next segment makes what lies beyond this one's end again.
      for (std::size_t x = segment.begin; x < segment.end; x += kWidth) {
        Colour colour = load_colour(planes.data(), plane, x, AllLanes{});
        for (Real& value : colour.c) value = value * (1.0F / 127.5F) - 1.0F;
        const Slot slot(around.guide(colour, x), bins);
        Real place{};
        if (x + kWidth <= width) place = load(plan.x.fraction.data() + x, AllLanes{});
        else place = load(plan.x.fraction.data() + x, SomeLanes(width - x));
        const Colour result = transformed(left, step, slot, place, colour);
        for (std::size_t c = 0; c < 3; ++c) {
          constexpr float kMagic = 0x1.8p+23F;  // adding it rounds to an integer, which the low bits then are
          const Real scaled = clamped_between((result.c[c] + 1.0F) * 127.5F, 0.0F, 255.0F) + kMagic;
          typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));
          const Bytes narrow8 = __builtin_convertvector((Bits)scaled & 0xffU, Bytes);
          std::memcpy(bytes.data() + c * plane + x, &narrow8, sizeof narrow8);
        }
      }
    }
    std::uint8_t* out = call.out + 3 * y * width;
    for (std::size_t x = 0; x < width; ++x) {
      for (std::size_t c = 0; c < 3; ++c) out[3 * x + c] = bytes[c * plane + x];
    }
  }
}

}  // namespace

extern const SliceKernels RLV2V_KERNELS;
const SliceKernels RLV2V_KERNELS{forward, backward, frame};

}  // namespace rlv2v

// A bilateral grid of colour transforms, sliced and applied to frames; no tensor of coefficients is made.
//
//   u = clamp((x + 1/2) w / W - 1/2, 0, w-1);  v the same of y, h, H;  s = clamp(guide bins - 1/2, 0, bins-1)
//   A = the trilinear interpolation of grid at (s, v, u), 3 x 4;       out = A (r, g, b, 1)
// Source: Gharbi et al. 2017, arXiv:1707.02880, section 3.3 and 3.4. Positions are those of PyTorch's grid_sample without
// align_corners and with padding by the border. Beyond the first and the last bin the guide has no gradient.
//
// Arrays are dense f32: grid (batch, 12, bins, grid_height, grid_width), of output c and input k at 4 c + k; guide
// (batch, height, width); frames, out and their gradients (batch, 3, height, width).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rlv2v {

constexpr std::int64_t kMaxBins = 8;
constexpr std::int64_t kMaxAround = 4;

struct SliceShape {
  std::int64_t batch, bins, grid_height, grid_width, height, width;
};

struct SliceForward {
  SliceShape shape;
  const float *grid, *guide, *frames;
  float* out;
  int num_threads;
};

// A gradient whose address is null is not computed. d_grid is summed in f64, in an order that threads do not change.
struct SliceBackward {
  SliceShape shape;
  const float *grid, *guide, *frames, *d_out;
  float *d_grid, *d_guide, *d_frames;
  int num_threads;
};

// One frame of 8-bit colours (height, width, 3) to another, where p is its values over 127.5, less 1, and q the planes
// `around` (K = num_around, around_height, around_width) interpolated at the pixel as the grid is:
//   guide = c_0 . (p, q, 1) + sum_{j > 0} f_j max(0, c_j . (p, q, 1));  curve is (num_curves, 5 + K), row j = (c_j, f_j)
//   frame -> round(127.5 (clamp(out) + 1))
// shape.batch is 1, and f_0 is ignored.
struct SliceFrame {
  SliceShape shape;
  const float *grid, *curve;
  std::int64_t num_curves;
  const float* around;
  std::int64_t num_around, around_height, around_width;
  const std::uint8_t* frame;
  std::uint8_t* out;
  int num_threads;
};

// All throw std::invalid_argument for a null that is not allowed, sizes below 1 (batch below 0) or too large, more bins
// than kMaxBins, more planes than kMaxAround, and num_threads < 1.
void slice_forward(const SliceForward& call);
void slice_backward(const SliceBackward& call);
void slice_frame(const SliceFrame& call);

// Where the pixels of an axis lie between the grid's cells.
struct SliceAxis {
  SliceAxis(std::int64_t cells, std::int64_t pixels);
  // Pixels [begin, end) lie between cells low and high, each at its own fraction of the way.
  struct Segment {
    std::size_t begin, end, low, high;
  };
  std::vector<Segment> segments;
  std::vector<std::size_t> segment;  // of each pixel
  std::vector<float> fraction;       // of each pixel
};

struct SlicePlan {
  explicit SlicePlan(const SliceShape& shape) : x(shape.grid_width, shape.width), y(shape.grid_height, shape.height) {}
  // Of the planes of a call that has some.
  explicit SlicePlan(const SliceFrame& call)
      : x(call.around_width, call.shape.width), y(call.around_height, call.shape.height) {}
  SliceAxis x, y;
};

// The functions of one instruction set: rows [first, last) of all frames' rows, or frames [first, last).
struct SliceKernels {
  void (*forward)(const SliceForward& call, const SlicePlan& plan, std::size_t first, std::size_t last);
  void (*backward)(const SliceBackward& call, const SlicePlan& plan, std::size_t first, std::size_t last);
  void (*frame)(const SliceFrame& call, const SlicePlan& plan, std::size_t first, std::size_t last);
};

}  // namespace rlv2v

#include "bilateral/slice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace rlv2v {

extern const SliceKernels kSlicePortable;
#ifdef RLV2V_X86
extern const SliceKernels kSliceAvx2;
extern const SliceKernels kSliceAvx512;
extern const SliceKernels kSliceAvx512Bf16;
#endif

namespace {

constexpr std::size_t kMinPerThread = 16384;  // pixels, some 50 us of work; chosen, not measured
constexpr const SliceKernels* kKernels[kNumIsas] = {
    &kSlicePortable,
#ifdef RLV2V_X86
    &kSliceAvx2,
    &kSliceAvx512,
    &kSliceAvx512Bf16,
#endif
};

const SliceKernels& kernels() { return *kKernels[static_cast<std::size_t>(isa())]; }

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("slice: " + name + " must be " + expected + ", got " + got);
}

constexpr std::int64_t kMax = std::int64_t{1} << 24;  // a fraction of a pixel in f32

void size(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) {
    refuse(name, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
  }
}

void check(const SliceShape& shape, int num_threads) {
  size("batch", shape.batch, 0, kMax);
  size("bins", shape.bins, 1, kMaxBins);
  size("grid height", shape.grid_height, 1, kMax);
  size("grid width", shape.grid_width, 1, kMax);
  size("height", shape.height, 1, kMax);
  size("width", shape.width, 1, kMax);
  size("num_threads", num_threads, 1, std::numeric_limits<int>::max());
  constexpr std::int64_t kMaxElements = std::numeric_limits<std::int64_t>::max() / 4;
  for (const auto elements : {shape.height * shape.width * 3, shape.grid_height * shape.grid_width * 12 * kMaxBins}) {
    if (shape.batch > kMaxElements / elements) refuse("batch", "of arrays that can exist", std::to_string(shape.batch));
  }
}

void require(const void* address, const char* name) {
  if (address == nullptr) refuse(name, "an address", "null");
}

// Runs a kernel over units of so many pixels each, in parts that num_threads threads take.
template <class Call>
void split(void (*kernel)(const Call&, const SlicePlan&, std::size_t, std::size_t), const Call& call,
           std::size_t units, std::size_t pixels) {
  const SlicePlan plan(call.shape);
#ifdef _OPENMP
  const std::size_t threads =
      std::min({static_cast<std::size_t>(call.num_threads), units, units * pixels / kMinPerThread});
  if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (std::size_t thread = 0; thread < threads; ++thread) {
      kernel(call, plan, units * thread / threads, units * (thread + 1) / threads);
    }
    return;
  }
#else
  static_cast<void>(pixels);
#endif
  kernel(call, plan, 0, units);
}

}  // namespace

SliceAxis::SliceAxis(std::int64_t cells, std::int64_t pixels) {
  const double scale = static_cast<double>(cells) / static_cast<double>(pixels);
  const auto last = static_cast<std::size_t>(cells - 1);
  const auto count = static_cast<std::size_t>(pixels);
  segment.reserve(count);
  fraction.reserve(count);
  for (std::size_t pixel = 0; pixel < count; ++pixel) {
    const double place = (static_cast<double>(pixel) + 0.5) * scale - 0.5;
    const double inside = std::min(std::max(place, 0.0), static_cast<double>(last));
    const auto low = static_cast<std::size_t>(inside);
    if (segments.empty() || segments.back().low != low) segments.push_back({pixel, pixel, low, std::min(low + 1, last)});
    segments.back().end = pixel + 1;
    segment.push_back(segments.size() - 1);
    fraction.push_back(static_cast<float>(inside - static_cast<double>(low)));
  }
}

void slice_forward(const SliceForward& call) {
  check(call.shape, call.num_threads);
  if (call.shape.batch == 0) return;
  require(call.grid, "grid");
  require(call.guide, "guide");
  require(call.frames, "frames");
  require(call.out, "out");
  split(kernels().forward, call, static_cast<std::size_t>(call.shape.batch * call.shape.height),
        static_cast<std::size_t>(call.shape.width));
}

void slice_backward(const SliceBackward& call) {
  check(call.shape, call.num_threads);
  if (call.shape.batch == 0) return;
  require(call.grid, "grid");
  require(call.guide, "guide");
  require(call.frames, "frames");
  require(call.d_out, "d_out");
  split(kernels().backward, call, static_cast<std::size_t>(call.shape.batch),
        static_cast<std::size_t>(call.shape.height * call.shape.width));
}

void slice_frame(const SliceFrame& call) {
  check(call.shape, call.num_threads);
  if (call.shape.batch != 1) refuse("batch", "1", std::to_string(call.shape.batch));
  if (call.num_curves < 1) refuse("num_curves", ">= 1", std::to_string(call.num_curves));
  require(call.grid, "grid");
  require(call.curve, "curve");
  size("num_around", call.num_around, 0, kMaxAround);
  if (call.num_around > 0) {
    require(call.around, "around");
    size("around height", call.around_height, 1, kMax);
    size("around width", call.around_width, 1, kMax);
  }
  require(call.frame, "frame");
  require(call.out, "out");
  split(kernels().frame, call, static_cast<std::size_t>(call.shape.height), static_cast<std::size_t>(call.shape.width));
}

}  // namespace rlv2v

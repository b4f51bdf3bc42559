#include "norm/sequence_norm.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"

namespace rlv2v {

extern const NormKernels kNormPortable;
#ifdef RLV2V_X86
extern const NormKernels kNormAvx2;
extern const NormKernels kNormAvx512;
extern const NormKernels kNormAvx512Bf16;
#endif

namespace {

constexpr std::size_t kMinPerThread = 65536;  // elements of x, some 30 us of work; chosen, not measured
constexpr const NormKernels* kKernels[kNumIsas] = {
    &kNormPortable,
#ifdef RLV2V_X86
    &kNormAvx2,
    &kNormAvx512,
    &kNormAvx512Bf16,
#endif
};

const NormKernels& kernels() { return *kKernels[static_cast<std::size_t>(isa())]; }

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("sequence_norm: " + name + " must be " + expected + ", got " + got);
}

template <class Call>
void check(const Call& call) {
  const NormShape& shape = call.shape;
  constexpr std::int64_t kMax = std::int64_t{1} << 31;
  const auto size = [](const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most) {
      refuse(name, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
    }
  };
  size("dtype", static_cast<int>(call.type), 0, kNumFloatTypes - 1);
  size("steps", shape.steps, 1, kMax);
  size("batch", shape.batch, 0, kMax);
  size("channels", shape.channels, 1, kMax / 64);  // a period of channels and vectors is still small
  size("height", shape.height, 1, kMax);
  size("width", shape.width, 1, kMax);
  size("pool height", shape.pool_height, 1, shape.height);
  size("pool width", shape.pool_width, 1, shape.width);
  size("num_threads", call.num_threads, 1, std::numeric_limits<int>::max());
  std::int64_t left = std::numeric_limits<std::int64_t>::max() / 8;
  for (const std::int64_t length : {shape.channels, shape.height, shape.width, shape.steps}) left /= length;
  if (shape.batch > left) refuse("batch", "of arrays that can exist", std::to_string(shape.batch));
}

void require(const void* address, const char* name) {
  if (address == nullptr) refuse(name, "an address", "null");
}

// Both or neither.
void require_pair(const void* one, const void* other, const char* names) {
  if ((one == nullptr) != (other == nullptr)) refuse(names, "both null or both not", "one");
}

bool pooling(const NormShape& shape) { return shape.pool_height * shape.pool_width > 1; }

// Runs run(first, last) on parts of the batch, one a thread.
template <class Call, class Run>
void split(const Call& call, const Run& run) {
  const auto batch = static_cast<std::size_t>(call.shape.batch);
#ifdef _OPENMP
  const auto each = static_cast<std::size_t>(call.shape.steps * call.shape.channels * call.shape.height *
                                             call.shape.width);
  const std::size_t threads =
      std::min({static_cast<std::size_t>(call.num_threads), batch, batch * each / kMinPerThread});
  if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (std::size_t thread = 0; thread < threads; ++thread) {
      run(batch * thread / threads, batch * (thread + 1) / threads);
    }
    return;
  }
#endif
  run(std::size_t{0}, batch);
}

}  // namespace

void norm_forward(const NormForward& call) {
  check(call);
  if (call.shape.batch == 0) return;
  require(call.x, "x");
  if (call.residual != nullptr || pooling(call.shape)) require(call.activated, "activated");
  if (pooling(call.shape)) require(call.pooled, "pooled");
  else if (call.pooled != nullptr) refuse("pooled", "null without windows", "an address");
  require_pair(call.weight, call.bias, "weight and bias");
  require_pair(call.given_mean, call.given_square, "given moments");
  require_pair(call.frame_mean, call.frame_square, "the frames' moments");
  if (call.weight != nullptr) {
    for (const void* output : {static_cast<const void*>(call.y), static_cast<const void*>(call.counts),
                               static_cast<const void*>(call.means), static_cast<const void*>(call.squares)}) {
      require(output, "y and its states");
    }
    require_pair(call.frames, call.mean, "state");
    require_pair(call.frames, call.square, "state");
  }
  const auto run = kernels().forward[static_cast<int>(call.type)];
  split(call, [&](std::size_t first, std::size_t last) { run(call, first, last); });
}

void norm_backward(const NormBackward& call) {
  check(call);
  const auto channels = static_cast<std::size_t>(call.shape.channels);
  const auto batch = static_cast<std::size_t>(call.shape.batch);
  std::vector<double> d_weight_bias(call.weight == nullptr ? 0 : batch * 2 * channels);
  if (call.shape.batch > 0) {
    require(call.values, "values");
    require_pair(call.d_means, call.d_squares, "the moments' gradients");
    if (call.weight != nullptr || call.d_means != nullptr) require(call.means, "means");
    if (call.weight != nullptr) require(call.squares, "squares");
    require_pair(call.d_mean, call.d_square, "the state's gradients");
    if (call.d_mean != nullptr) require(call.frames, "frames");
    if (call.given) {
      require(call.d_given_mean, "the given moments' gradients");
      require(call.d_given_square, "the given moments' gradients");
    }
    const auto run = kernels().backward[static_cast<int>(call.type)];
    split(call, [&](std::size_t first, std::size_t last) { run(call, d_weight_bias.data(), first, last); });
  }
  if (call.weight == nullptr) return;
  for (std::size_t c = 0; c < channels; ++c) {
    double d_weight = 0.0;
    double d_bias = 0.0;
    for (std::size_t b = 0; b < batch; ++b) {
      d_weight += d_weight_bias[2 * b * channels + c];
      d_bias += d_weight_bias[(2 * b + 1) * channels + c];
    }
    if (call.d_weight != nullptr) call.d_weight[c] = static_cast<float>(d_weight);
    if (call.d_bias != nullptr) call.d_bias[c] = static_cast<float>(d_bias);
  }
}

}  // namespace rlv2v

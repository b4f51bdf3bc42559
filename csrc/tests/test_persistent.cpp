// The persistent ConvLSTM kernels, emulated (see emulation.h), against plain fp64 loops on the same 16-bit inputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "convlstm/persistent_kernel.cuh"
#include "persistent_ref.h"

namespace {

using rlv2v::ConvLstmShape;
using rlv2v::Doubles;
using rlv2v::PersistentPlan;
using rlv2v::device::Bfloat;
using rlv2v::device::Half;

constexpr rlv2v::DeviceLimits kSm86{46, 101376};
constexpr rlv2v::DeviceLimits kSm90{132, 232448};

// Memory as a kernel gets it: NaN where nothing was written yet, with bytes on either side that must stay.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size) : bytes_(size * sizeof(T) + 2 * kGuard + 16, '\xff'), size_(size) {
    const auto at = reinterpret_cast<std::uintptr_t>(bytes_.data()) + kGuard;
    data_ = reinterpret_cast<T*>((at + 15) / 16 * 16);
    std::fill(bytes_.data(), reinterpret_cast<char*>(data_), kByte);
    std::fill(reinterpret_cast<char*>(data_ + size_), bytes_.data() + bytes_.size(), kByte);
  }
  T* get() { return size_ > 0 ? data_ : nullptr; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t k) { return data_[k]; }
  bool intact() const {
    const auto same = [](char byte) { return byte == kByte; };
    return std::all_of(bytes_.data(), reinterpret_cast<const char*>(data_), same) &&
           std::all_of(reinterpret_cast<const char*>(data_ + size_), bytes_.data() + bytes_.size(), same);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr char kByte = '\x5a';
  std::vector<char> bytes_;
  std::size_t size_;
  T* data_;
};

struct Case {
  ConvLstmShape shape;  // G, T, B, C, H, W, k
  rlv2v::DeviceLimits limits;
  bool state;  // h0 and c0 given; dh0 asked for
  bool keeps;  // forward: gates kept; backward: gates activated, dcs given
};

struct Limits {
  double forward, gradient;
};
template <class D>
constexpr Limits kWithin{2e-3, 2e-3};
template <>
constexpr Limits kWithin<Bfloat>{1.5e-2, 2.5e-2};

// Uniform values in [low, high), as the kernel gets them and as the reference does.
template <class D>
Doubles fill(Buffer<std::uint16_t>& buffer, std::uint64_t seed, double low, double high) {
  const Draws draws(seed);
  Doubles values(buffer.size());
  for (std::size_t k = 0; k < values.size(); ++k) {
    buffer[k] = D::from_float(static_cast<float>(low + (high - low) * draws.uniform(k)));
    values[k] = static_cast<double>(D::to_float(buffer[k]));
  }
  return values;
}
Doubles fill(Buffer<float>& buffer, std::uint64_t seed, double low, double high) {
  const Draws draws(seed);
  Doubles values(buffer.size());
  for (std::size_t k = 0; k < values.size(); ++k) {
    buffer[k] = static_cast<float>(low + (high - low) * draws.uniform(k));
    values[k] = static_cast<double>(buffer[k]);
  }
  return values;
}

// The largest error relative to the largest value, infinite where a NaN is left.
template <class Read>
double error_of(std::size_t size, const Doubles& expected, const Read& read) {
  CHECK(size == expected.size());
  double most = 0, error = 0;
  for (std::size_t k = 0; k < size; ++k) {
    const double value = static_cast<double>(read(k));
    if (std::isnan(value)) return INFINITY;
    most = std::max(most, std::abs(expected[k]));
    error = std::max(error, std::abs(value - expected[k]));
  }
  return error / std::max(most, 1e-30);
}
template <class D>
double error_of(Buffer<std::uint16_t>& got, const Doubles& expected) {
  return error_of(got.size(), expected, [&](std::size_t k) { return D::to_float(got[k]); });
}
double error_of(Buffer<float>& got, const Doubles& expected) {
  return error_of(got.size(), expected, [&](std::size_t k) { return got[k]; });
}

struct Sizes {
  std::size_t state, sequence, weight, counters;
  explicit Sizes(const ConvLstmShape& s)
      : state(std::size_t(s.groups) * std::size_t(s.batch * s.height * s.width) * std::size_t(s.channels)),
        sequence(state * std::size_t(s.steps)),
        weight(std::size_t(s.groups) * 4 * std::size_t(s.channels * s.channels * s.kernel * s.kernel)),
        counters(std::size_t(s.groups) * rlv2v::kCounterStride) {}
};

double weight_range(const ConvLstmShape& s) { return 1.7 / std::sqrt(s.channels * s.kernel * s.kernel); }

void report(const char* what, const Case& one, const PersistentPlan& plan, double error, double limit) {
  const ConvLstmShape& s = one.shape;
  std::printf(
      "%s G%d T%d B%d C%d %dx%d k%d: slice %d, %d x %d x %d CTAs, %d tiles of %dx%dx%d, stage of %d, error %.1e of "
      "%.1e\n",
      what, s.groups, s.steps, s.batch, s.channels, s.height, s.width, s.kernel, plan.slice, s.groups, plan.slices,
      plan.ctas, plan.tiles(), 1 << plan.log_batch, 1 << plan.log_height, 1 << plan.log_width, plan.chunk, error,
      limit);
  std::fflush(stdout);
  CHECK(error <= limit);
}

PersistentPlan planned(const Case& one, bool backward) {
  PersistentPlan plan{};
  const std::string reason = rlv2v::plan_persistent(one.shape, backward, one.limits, plan);
  if (!reason.empty()) std::fprintf(stderr, "%s\n", reason.c_str());
  CHECK(reason.empty());
  return plan;
}

template <class D>
void check_forward(const Case& one, std::uint64_t seed) {
  const Sizes sizes(one.shape);
  const PersistentPlan plan = planned(one, false);
  Buffer<std::uint16_t> a(4 * sizes.sequence), w(sizes.weight), h0(one.state ? sizes.state : 0);
  Buffer<float> c0(one.state ? sizes.state : 0), cs(sizes.sequence);
  Buffer<std::uint16_t> hs(sizes.sequence), gates(one.keeps ? 4 * sizes.sequence : 0);
  Buffer<std::uint32_t> counters(sizes.counters);
  std::fill(counters.get(), counters.get() + counters.size(), 0);
  const Doubles a_in = fill<D>(a, seed, -2, 2);
  const double range = weight_range(one.shape);
  const Doubles w_in = fill<D>(w, seed + 1, -range, range);
  const Doubles h0_in = fill<D>(h0, seed + 2, -1, 1);
  const Doubles c0_in = fill(c0, seed + 3, -1.5, 1.5);
  const rlv2v::PersistentForward pass{rlv2v::persistent_geometry(one.shape, plan),
                                      a.get(),
                                      w.get(),
                                      h0.get(),
                                      c0.get(),
                                      hs.get(),
                                      cs.get(),
                                      gates.get(),
                                      counters.get()};
  const auto kernel = [&] { plan.slice == 16 ? rlv2v::forward_pass<D, 16>(pass) : rlv2v::forward_pass<D, 8>(pass); };
  const int conflicts =
      rlv2v::device::run_grid(plan.blocks, rlv2v::kPersistentThreads, plan.shared_bytes, seed, kernel);
  CHECK(conflicts == 0 || plan.log_width < 2);
  Doubles hs_ref, cs_ref, gates_ref;
  rlv2v::Recurrence(one.shape).forward(a_in, w_in, h0_in, c0_in, hs_ref, cs_ref, gates_ref);
  double error = std::max(error_of<D>(hs, hs_ref), error_of(cs, cs_ref));
  if (one.keeps) error = std::max(error, error_of<Half>(gates, gates_ref));
  CHECK(a.intact() && w.intact() && h0.intact() && c0.intact() && hs.intact() && cs.intact() && gates.intact() &&
        counters.intact());
  report("forward ", one, plan, error, kWithin<D>.forward);
}

template <class D>
void check_backward(const Case& one, std::uint64_t seed) {
  const Sizes sizes(one.shape);
  const PersistentPlan plan = planned(one, true);
  const std::size_t channels = static_cast<std::size_t>(one.shape.channels);
  Buffer<std::uint16_t> dhs(sizes.sequence), gates(4 * sizes.sequence), w(sizes.weight);
  Buffer<float> dcs(one.keeps ? sizes.sequence : 0), cs(sizes.sequence), c0(one.state ? sizes.state : 0),
      dc0(sizes.state);
  Buffer<std::uint16_t> da(4 * sizes.sequence), dh0(one.state ? sizes.state : 0);
  Buffer<std::uint32_t> counters(sizes.counters);
  std::fill(counters.get(), counters.get() + counters.size(), 0);
  const Doubles dhs_in = fill<D>(dhs, seed, -1, 1);
  const Doubles dcs_in = fill(dcs, seed + 1, -1, 1);
  Doubles gates_in = one.keeps ? fill<Half>(gates, seed + 2, 0.05, 0.95) : fill<D>(gates, seed + 2, -2, 2);
  for (std::size_t k = 0; !one.keeps && k < gates_in.size(); ++k) {
    gates_in[k] = k / channels % 4 == 3 ? std::tanh(gates_in[k]) : 1 / (1 + std::exp(-gates_in[k]));
  }
  const Doubles cs_in = fill(cs, seed + 3, -1.5, 1.5);
  const Doubles c0_in = fill(c0, seed + 4, -1.5, 1.5);
  const double range = weight_range(one.shape);
  const Doubles w_in = fill<D>(w, seed + 5, -range, range);
  const rlv2v::PersistentBackward pass{rlv2v::persistent_geometry(one.shape, plan),
                                       dhs.get(),
                                       dcs.get(),
                                       gates.get(),
                                       one.keeps,
                                       cs.get(),
                                       c0.get(),
                                       w.get(),
                                       da.get(),
                                       dh0.get(),
                                       dc0.get(),
                                       counters.get()};
  const auto kernel = [&] { plan.slice == 16 ? rlv2v::backward_pass<D, 16>(pass) : rlv2v::backward_pass<D, 8>(pass); };
  const int conflicts =
      rlv2v::device::run_grid(plan.blocks, rlv2v::kPersistentThreads, plan.shared_bytes, seed, kernel);
  CHECK(conflicts == 0 || plan.log_width < 2);
  Doubles da_ref, dh0_ref, dc0_ref;
  rlv2v::Recurrence(one.shape).backward(dhs_in, dcs_in, gates_in, cs_in, c0_in, w_in, da_ref, dh0_ref, dc0_ref);
  double error = std::max(error_of<D>(da, da_ref), error_of(dc0, dc0_ref));
  if (one.state) error = std::max(error, error_of<D>(dh0, dh0_ref));
  CHECK(dhs.intact() && dcs.intact() && gates.intact() && cs.intact() && c0.intact() && w.intact() && da.intact() &&
        dh0.intact() && dc0.intact() && counters.intact());
  report("backward", one, plan, error, kWithin<D>.gradient);
}

void test_kernels() {
  const std::vector<Case> cases{
      {{1, 3, 1, 1, 1, 1, 3}, {1, 101376}, true, true},     // one pixel of one channel
      {{2, 3, 3, 5, 5, 6, 3}, {4, 101376}, true, false},    // odd C: channel by channel
      {{1, 4, 1, 8, 17, 9, 3}, {1, 101376}, false, true},   // several tiles a CTA, two stages
      {{1, 2, 2, 16, 9, 7, 5}, {1, 101376}, true, true},    // slices of 16
      {{1, 3, 3, 24, 3, 5, 1}, {2, 101376}, false, false},  // a tile over several images; half a slice
      {{2, 2, 1, 20, 4, 9, 3}, {6, 30000}, true, true},     // C not a multiple of 8; little shared memory
      {{1, 1, 2, 16, 8, 8, 3}, {1, 101376}, false, true},   // T = 1 without a state: no convolution
      {{1, 2, 1, 40, 8, 9, 3}, {3, 101376}, true, false},   // a last chunk that is not full
      {{1, 2, 1, 40, 8, 9, 3}, {5, 48000}, true, true},     // slices of 8
      {{1, 3, 1, 40, 9, 5, 3}, {5, 36000}, true, false},    // the same with the smallest stage
      {{1, 2, 1, 64, 8, 9, 3}, {4, 101376}, false, true},   // as large as fits on sm_86
  };
  for (std::size_t k = 0; k < cases.size(); ++k) {
    check_forward<Half>(cases[k], 100 * k);
    check_forward<Bfloat>(cases[k], 100 * k + 10);
    check_backward<Half>(cases[k], 100 * k + 20);
    check_backward<Bfloat>(cases[k], 100 * k + 30);
  }
}

// What is said to fit, and that a plan keeps to its limits.
void test_plans() {
  PersistentPlan plan{};
  for (const bool backward : {false, true}) {
    CHECK(rlv2v::plan_persistent({1, 8, 4, 64, 32, 32, 3}, backward, kSm86, plan).empty());
    CHECK(plan.weight_bytes == 73728 && plan.slice == 16 && plan.shared_bytes <= kSm86.shared_bytes);
    CHECK(rlv2v::plan_persistent({1, 8, 4, 128, 32, 32, 3}, backward, kSm90, plan).empty() && plan.slice == 16);
    CHECK(rlv2v::plan_persistent({1, 8, 4, 128, 32, 32, 3}, backward, kSm86, plan).empty() && plan.slice == 8);
    CHECK(rlv2v::plan_persistent({1, 8, 4, 256, 32, 32, 3}, backward, kSm86, plan).find("shared memory") !=
          std::string::npos);
    CHECK(rlv2v::plan_persistent({12, 8, 4, 64, 32, 32, 3}, backward, kSm86, plan).find("resident") !=
          std::string::npos);
    CHECK(rlv2v::plan_persistent({1, 8, 4, 64, 32, 32, 7}, backward, kSm86, plan).find("k must be") !=
          std::string::npos);
    CHECK(rlv2v::plan_persistent({1, 0, 4, 64, 32, 32, 3}, backward, kSm86, plan).find("at least 1") !=
          std::string::npos);
    CHECK(rlv2v::plan_persistent({1, 1, 1 << 20, 64, 32, 32, 3}, backward, kSm86, plan).find("2^31") !=
          std::string::npos);
  }
  for (int channels = 1; channels <= 64; channels += 7) {
    for (const int kernel : {1, 3, 5}) {
      for (const int side : {1, 3, 8, 33}) {
        const ConvLstmShape shape{1, 2, 5, channels, side, side + 1, kernel};
        if (!rlv2v::plan_persistent(shape, true, kSm86, plan).empty()) continue;
        CHECK(plan.shared_bytes <= kSm86.shared_bytes && plan.slices * plan.slice >= channels &&
              plan.ctas <= plan.tiles());
        CHECK(plan.blocks <= kSm86.sms * rlv2v::kMostBlocksPerSm);
        const rlv2v::PersistentGeometry geometry = rlv2v::persistent_geometry(shape, plan);
        for (int k = 0; k < geometry.patch_pixels; ++k) {  // its divisions by multiplication
          const auto divided = [&](std::uint32_t per) {
            return static_cast<int>(static_cast<std::uint32_t>(k) * per >> 20);
          };
          CHECK(divided(geometry.per_row) == k / geometry.patch_width);
          CHECK(divided(geometry.per_image) == k / (geometry.patch_width * geometry.patch_height));
        }
      }
    }
  }
}

// The emulation's own 16-bit floats: to and back, and ties to even.
void test_floats() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (!std::isnan(Half::to_float(half))) CHECK(Half::from_float(Half::to_float(half)) == half);
    if (!std::isnan(Bfloat::to_float(half))) CHECK(Bfloat::from_float(Bfloat::to_float(half)) == half);
  }
  CHECK(Half::to_float(0x3c00) == 1.0f && Half::to_float(0xc000) == -2.0f &&
        Half::to_float(1) == std::ldexp(1.0f, -24));
  CHECK(Half::from_float(1.0f + std::ldexp(1.0f, -11)) == 0x3c00 &&
        Half::from_float(1.0f + 3 * std::ldexp(1.0f, -11)) == 0x3c02);
  CHECK(Bfloat::from_float(1.0f + std::ldexp(1.0f, -8)) == 0x3f80 && Half::from_float(1e6f) == 0x7c00);
}

}  // namespace

int main() {
  test_floats();
  test_plans();
  test_kernels();
  return 0;
}

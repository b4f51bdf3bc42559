// The persistent ConvLSTM kernels, emulated (see emulation.h), against plain fp64 loops on the same 16-bit inputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "convlstm/persistent_kernel.cuh"
#include "formats.h"
#include "persistent_ref.h"

namespace {

using rlv2v::ConvLstmShape;
using rlv2v::Doubles;
using rlv2v::PersistentPlan;
using rlv2v::device::Bfloat;
using rlv2v::device::Half;

constexpr rlv2v::DeviceLimits kSm86{46, 101376};
constexpr rlv2v::DeviceLimits kSm90{132, 232448};

struct Case {
  ConvLstmShape shape;  // G, T, B, C, H, W, k
  rlv2v::DeviceLimits limits;
  bool state;   // with h0, c0 and dh0
  bool stored;  // forward: stores gates; backward: gates activated, with dcs
};

// Limits of the error relative to the largest value.
struct Type {
  Format format;
  double forward, gradient;
};
template <class D>
constexpr Type kType{kFloat16, 2e-3, 2e-3};
template <>
constexpr Type kType<Bfloat>{kBfloat16, 1.5e-2, 2.5e-2};

// An array as a kernel gets it, NaN at first.
struct Memory : Array {
  Memory(Format format, std::size_t size) : Array(format, size, 16) {}
  Doubles values() const {
    Doubles all(size());
    for (std::size_t k = 0; k < size(); ++k) all[k] = (*this)[k];
    return all;
  }
  std::uint16_t* halves() { return data<std::uint16_t>(); }
  float* floats() { return data<float>(); }
};

// Returns the largest error relative to the largest value, infinity if a NaN is left.
double error_of(const Memory& got, const Doubles& expected) {
  CHECK(got.size() == expected.size());
  double largest = 1e-30, error = 0;
  for (std::size_t k = 0; k < got.size(); ++k) {
    if (std::isnan(got[k])) return INFINITY;
    largest = std::max(largest, std::abs(expected[k]));
    error = std::max(error, std::abs(got[k] - expected[k]));
  }
  return error / largest;
}

struct Sizes {
  std::size_t state, sequence, weight;
  explicit Sizes(const ConvLstmShape& s)
      : state(std::size_t(s.groups) * std::size_t(s.batch * s.height * s.width) * std::size_t(s.channels)),
        sequence(state * std::size_t(s.steps)),
        weight(std::size_t(s.groups) * 4 * std::size_t(s.channels * s.channels * s.kernel * s.kernel)) {}
};

double weight_range(const ConvLstmShape& s) { return 1.7 / std::sqrt(s.channels * s.kernel * s.kernel); }

void report(const char* pass, const Case& one, const PersistentPlan& plan, double error, double limit) {
  const ConvLstmShape& s = one.shape;
  std::printf(
      "%s G%d T%d B%d C%d %dx%d k%d: slice %d, %d x %d x %d CTAs, %d tiles of %dx%dx%d, stage of %d, error %.1e of "
      "%.1e\n",
      pass, s.groups, s.steps, s.batch, s.channels, s.height, s.width, s.kernel, plan.slice, s.groups, plan.slices,
      plan.ctas, plan.tiles, 1 << plan.log_batch, 1 << plan.log_height, 1 << plan.log_width, plan.chunk, error,
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

// Runs a pass in the emulation, with its counters at zero.
template <class D, class Pass>
void run(const Case& one, const PersistentPlan& plan, Pass pass, std::uint64_t seed) {
  Memory counters(kSingle, std::size_t(one.shape.groups) * rlv2v::kCounterStride);
  for (std::size_t k = 0; k < counters.size(); ++k) counters.set_bits(k, 0);
  pass.geometry = rlv2v::persistent_geometry(one.shape, plan);
  pass.counters = counters.data<std::uint32_t>();
  const auto kernel = [&] { plan.slice == 16 ? rlv2v::run_pass<D, 16>(pass) : rlv2v::run_pass<D, 8>(pass); };
  const int conflicts =
      rlv2v::device::run_grid(plan.blocks, rlv2v::kPersistentThreads, plan.shared_bytes, seed, kernel);
  CHECK(conflicts == 0 || plan.log_width < 2);
}

template <class D>
void check_forward(const Case& one, std::uint64_t seed) {
  const Format format = kType<D>.format;
  const Sizes sizes(one.shape);
  const PersistentPlan plan = planned(one, false);
  Memory a(format, 4 * sizes.sequence), w(format, sizes.weight), h0(format, one.state ? sizes.state : 0);
  Memory c0(kSingle, one.state ? sizes.state : 0), cs(kSingle, sizes.sequence);
  Memory hs(format, sizes.sequence), gates(kFloat16, one.stored ? 4 * sizes.sequence : 0);
  const double range = weight_range(one.shape);
  a.fill(seed, -2, 2);
  w.fill(seed + 1, -range, range);
  h0.fill(seed + 2, -1, 1);
  c0.fill(seed + 3, -1.5, 1.5);
  run<D>(one, plan,
         rlv2v::PersistentForward{{}, a.halves(), w.halves(), h0.halves(), c0.floats(), hs.halves(), cs.floats(),
                                  gates.halves(), nullptr},
         seed);
  Doubles hs_ref, cs_ref, gates_ref;
  rlv2v::Recurrence(one.shape).forward(a.values(), w.values(), h0.values(), c0.values(), hs_ref, cs_ref, gates_ref);
  double error = std::max(error_of(hs, hs_ref), error_of(cs, cs_ref));
  if (one.stored) error = std::max(error, error_of(gates, gates_ref));
  report("forward ", one, plan, error, kType<D>.forward);
}

template <class D>
void check_backward(const Case& one, std::uint64_t seed) {
  const Format format = kType<D>.format;
  const Sizes sizes(one.shape);
  const PersistentPlan plan = planned(one, true);
  const std::size_t channels = static_cast<std::size_t>(one.shape.channels);
  Memory dhs(format, sizes.sequence), gates(one.stored ? kFloat16 : format, 4 * sizes.sequence),
      w(format, sizes.weight);
  Memory dcs(kSingle, one.stored ? sizes.sequence : 0), cs(kSingle, sizes.sequence), dc0(kSingle, sizes.state);
  Memory c0(kSingle, one.state ? sizes.state : 0), dh0(format, one.state ? sizes.state : 0);
  Memory da(format, 4 * sizes.sequence);
  const double range = weight_range(one.shape);
  dhs.fill(seed, -1, 1);
  dcs.fill(seed + 1, -1, 1);
  gates.fill(seed + 2, one.stored ? 0.05 : -2, one.stored ? 0.95 : 2);
  cs.fill(seed + 3, -1.5, 1.5);
  c0.fill(seed + 4, -1.5, 1.5);
  w.fill(seed + 5, -range, range);
  Doubles activated = gates.values();
  for (std::size_t k = 0; !one.stored && k < activated.size(); ++k) {
    activated[k] = k / channels % 4 == 3 ? std::tanh(activated[k]) : 1 / (1 + std::exp(-activated[k]));
  }
  run<D>(one, plan,
         rlv2v::PersistentBackward{{}, dhs.halves(), dcs.floats(), gates.halves(), one.stored, cs.floats(), c0.floats(),
                                   w.halves(), da.halves(), dh0.halves(), dc0.floats(), nullptr},
         seed);
  Doubles da_ref, dh0_ref, dc0_ref;
  rlv2v::Recurrence(one.shape).backward(dhs.values(), dcs.values(), activated, cs.values(), c0.values(), w.values(),
                                        da_ref, dh0_ref, dc0_ref);
  double error = std::max(error_of(da, da_ref), error_of(dc0, dc0_ref));
  if (one.state) error = std::max(error, error_of(dh0, dh0_ref));
  report("backward", one, plan, error, kType<D>.gradient);
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

// Which shapes fit, and that a plan stays within its limits.
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
              plan.ctas <= plan.tiles);
        CHECK(plan.blocks <= kSm86.sms * rlv2v::kMaxBlocksPerSm);
        const rlv2v::PersistentGeometry geometry = rlv2v::persistent_geometry(shape, plan);
        for (int k = 0; k < geometry.patch_pixels; ++k) {  // divides by multiplication
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

// The emulation's own 16-bit floats round to even, and every number comes back.
void test_floats() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (!std::isnan(Half::to_float(half))) CHECK(Half::from_float(Half::to_float(half)) == half);
    if (!std::isnan(Bfloat::to_float(half))) CHECK(Bfloat::from_float(Bfloat::to_float(half)) == half);
  }
  CHECK(Half::to_float(1) == std::ldexp(1.0f, -24) && Half::to_float(0xc000) == -2.0f &&
        Half::from_float(1e6f) == 0x7c00);
  CHECK(Half::from_float(1.0f + 3 * std::ldexp(1.0f, -11)) == 0x3c02);
  CHECK(Bfloat::from_float(1.0f + std::ldexp(1.0f, -8)) == 0x3f80);
}

}  // namespace

int main() {
  test_floats();
  test_plans();
  test_kernels();
  return 0;
}

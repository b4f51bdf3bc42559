#include <algorithm>
#include <cstdint>
#include <vector>

#include "convlstm/persistent.h"

namespace rlv2v {
namespace {

constexpr int kSegmentBytes = 32;     // 16 channels of one pixel
constexpr int kReservedBytes = 1024;  // shared memory of an SM that each block takes besides its own

int ceil_div(int value, int by) { return (value + by - 1) / by; }

int patch_of(const PersistentPlan& plan, int kernel) {
  return (1 << plan.log_batch) * ((1 << plan.log_height) + kernel - 1) * ((1 << plan.log_width) + kernel - 1);
}

// Returns every tile of 64 pixels, those that leave the fewest pixels unused first, then those with the smallest halo.
std::vector<PersistentPlan> tilings(const ConvLstmShape& shape) {
  std::vector<PersistentPlan> all;
  for (int log_batch = 0; log_batch <= 6; ++log_batch) {
    for (int log_height = 0; log_batch + log_height <= 6; ++log_height) {
      PersistentPlan plan{};
      plan.log_batch = log_batch;
      plan.log_height = log_height;
      plan.log_width = 6 - log_batch - log_height;
      plan.tiles_height = ceil_div(shape.height, 1 << plan.log_height);
      plan.tiles_width = ceil_div(shape.width, 1 << plan.log_width);
      plan.tiles = ceil_div(shape.batch, 1 << plan.log_batch) * plan.tiles_height * plan.tiles_width;
      all.push_back(plan);
    }
  }
  std::stable_sort(all.begin(), all.end(), [&](const PersistentPlan& left, const PersistentPlan& right) {
    if (left.tiles != right.tiles) return left.tiles < right.tiles;
    return patch_of(left, shape.kernel) < patch_of(right, shape.kernel);
  });
  return all;
}

// Chooses the largest stage of which two fit next to the weight; returns false if none does.
bool choose_stage(PersistentPlan& plan, int patch, int segments, int limit) {
  for (plan.chunk = 4; plan.chunk > 0; plan.chunk /= 2) {
    plan.shared_bytes = plan.weight_bytes + 2 * patch * plan.chunk * kSegmentBytes;
    const bool half_would_do = plan.chunk / 2 >= segments;
    if (!half_would_do && plan.shared_bytes <= limit) return true;
  }
  return false;
}

// Sets ctas and blocks; returns false if the device cannot hold one CTA for each slice.
bool share_tiles(PersistentPlan& plan, int groups, const DeviceLimits& limits) {
  const int per_sm =
      std::min(kMaxBlocksPerSm, (limits.shared_bytes + kReservedBytes) / (plan.shared_bytes + kReservedBytes));
  const std::int64_t max_ctas = std::int64_t{limits.sms} * per_sm / (std::int64_t{groups} * plan.slices);
  if (max_ctas < 1) return false;
  const int max_tiles = static_cast<int>(std::min<std::int64_t>(plan.tiles, max_ctas));
  plan.ctas = ceil_div(plan.tiles, ceil_div(plan.tiles, max_tiles));  // no more than what the busiest needs
  plan.blocks = groups * plan.slices * plan.ctas;
  return true;
}

std::string check(const ConvLstmShape& shape) {
  for (const int size : {shape.groups, shape.steps, shape.batch, shape.channels, shape.height, shape.width}) {
    if (size < 1) return "sizes (G,T,B,C,H,W) must be at least 1, got " + std::to_string(size);
  }
  if (shape.kernel != 1 && shape.kernel != 3 && shape.kernel != 5) {
    return "k must be 1, 3 or 5, got " + std::to_string(shape.kernel);
  }
  const double frame = 4.0 * shape.batch * shape.channels * shape.height * shape.width;
  if (frame >= 2147483648.0)
    return "a step's 4*B*C*H*W must be below 2^31, got " + std::to_string(static_cast<long long>(frame));
  return "";
}

}  // namespace

std::string plan_persistent(const ConvLstmShape& shape, bool backward, const DeviceLimits& limits,
                            PersistentPlan& plan) {
  if (std::string reason = check(shape); !reason.empty()) return reason;
  const int segments = ceil_div(backward ? 4 * shape.channels : shape.channels, 16);
  int min_bytes = 0;
  std::int64_t min_ctas = 0;
  const auto fill = [&](int slice) {
    const int slices = ceil_div(shape.channels, slice);
    const double weight = 256.0 * shape.kernel * shape.kernel * segments * (backward ? slice / 8 : slice / 2);
    for (PersistentPlan candidate : tilings(shape)) {
      candidate.slice = slice;
      candidate.slices = slices;
      candidate.weight_bytes = static_cast<int>(std::min(weight, 1e9));
      const bool staged = choose_stage(candidate, patch_of(candidate, shape.kernel), segments, limits.shared_bytes);
      min_bytes = min_bytes == 0 ? candidate.shared_bytes : std::min(min_bytes, candidate.shared_bytes);
      if (!staged) continue;
      min_ctas = std::int64_t{shape.groups} * slices;
      if (!share_tiles(candidate, shape.groups, limits)) continue;
      plan = candidate;
      return true;
    }
    return false;
  };
  // Slices of 16 read the state half as often; those of 8 are for shapes that leave half of the SMs idle or do not fit.
  bool fits = shape.channels > 8 && fill(16);
  if (!fits || 2 * plan.blocks <= limits.sms) fits = fill(8) || fits;
  if (fits) return "";
  if (min_ctas > 0) {
    return "one CTA for each slice of each group must be resident, " + std::to_string(min_ctas) +
           ", the device has " + std::to_string(limits.sms) + " SMs";
  }
  return "C=" + std::to_string(shape.channels) + ", k=" + std::to_string(shape.kernel) + " needs " +
         std::to_string(min_bytes) + " bytes of shared memory a block, the device has " +
         std::to_string(limits.shared_bytes);
}

PersistentGeometry persistent_geometry(const ConvLstmShape& shape, const PersistentPlan& plan) {
  PersistentGeometry geometry{shape, plan, 0, 0, patch_of(plan, shape.kernel), 0, 0};
  geometry.patch_height = (1 << plan.log_height) + shape.kernel - 1;
  geometry.patch_width = (1 << plan.log_width) + shape.kernel - 1;
  const auto reciprocal = [](int by) { return static_cast<std::uint32_t>(ceil_div(1 << 20, by)); };
  geometry.per_row = reciprocal(geometry.patch_width);
  geometry.per_image = reciprocal(geometry.patch_height * geometry.patch_width);
  return geometry;
}

}  // namespace rlv2v

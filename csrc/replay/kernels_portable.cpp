#include <algorithm>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

void scan8(double* p) {
  for (std::size_t step = 1; step < 8; step *= 2) {
    for (std::size_t k = 8; k-- > step;) p[k] += p[k - step];
  }
}

void scan16(const float* leaves, double* p) {
  for (std::size_t k = 0; k < kLeafGroup; ++k) p[k] = static_cast<double>(leaves[k]);
  scan8(p);
  scan8(p + 8);
  for (std::size_t k = 8; k < kLeafGroup; ++k) p[k] += p[7];
}

// The first positive summand whose running sum is past the point, or else the last positive one.
template <class Summand>
std::uint32_t choose(const Summand* summands, const double* scan, double point, std::size_t count) {
  std::uint32_t positive = 0;
  for (std::uint32_t k = 0; k < count; ++k) {
    if (!(summands[k] > 0)) continue;
    if (scan[k] > point) return k;
    positive = k;
  }
  return positive;
}

void descend(const double* sums, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const double* of_node = sums + std::size_t{node[k]} * kFanout;
    double scan[kFanout];
    std::copy(of_node, of_node + kFanout, scan);
    scan8(scan);
    const std::uint32_t chosen = choose(of_node, scan, point[k], kFanout);
    point[k] -= chosen > 0 ? scan[chosen - 1] : 0.0;
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + chosen;
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

void pick(const float* leaves, const double* point, std::uint32_t* index, float* value, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{index[k]} * kLeafGroup;
    double scan[kLeafGroup];
    scan16(group, scan);
    const std::uint32_t chosen = choose(group, scan, point[k], kLeafGroup);
    index[k] = index[k] * static_cast<std::uint32_t>(kLeafGroup) + chosen;
    value[k] = group[chosen];
  }
}

void sum_leaves(const float* leaves, const std::uint32_t* groups, std::size_t count, double* sums, std::uint32_t* highs) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{groups[k]} * kLeafGroup;
    double scan[kLeafGroup];
    scan16(group, scan);
    std::uint32_t high = 0;
    for (std::size_t leaf = 0; leaf < kLeafGroup; ++leaf) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, group + leaf, sizeof bits);
      high = std::max(high, 0U - bits);
    }
    sums[groups[k]] = scan[kLeafGroup - 1];
    highs[groups[k]] = high;
  }
}

void sum_nodes(const double* sums_below, const std::uint32_t* highs_below, const std::uint32_t* nodes, std::size_t count,
               double* sums, std::uint32_t* highs) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t first = std::size_t{nodes[k]} * kFanout;
    double scan[kFanout];
    std::copy(sums_below + first, sums_below + first + kFanout, scan);
    scan8(scan);
    sums[nodes[k]] = scan[kFanout - 1];
    highs[nodes[k]] = *std::max_element(highs_below + first, highs_below + first + kFanout);
  }
}

void stream(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

void stream_two(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  std::memcpy(also_to, from, bytes);
}

void fence() {}

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable{"portable", power<2>,   weigh<2>,  uniform, descend,    pick,
                        sum_leaves, sum_nodes, stream,    stream_two, fence};

}  // namespace rlv2v

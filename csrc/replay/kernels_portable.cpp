#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

void descend(const Node* nodes, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const double* sums = nodes[node[k]].prefix;
    std::uint32_t passed = 0;    // children that end at or before the point
    std::uint32_t positive = 0;  // the last child with weight: those before it end below the node's total
    for (std::size_t child = 0; child < kFanout; ++child) {
      passed += sums[child] <= point[k] ? 1U : 0U;
      positive += sums[child] < sums[kFanout - 1] ? 1U : 0U;
    }
    const std::uint32_t chosen = passed < positive ? passed : positive;
    point[k] -= chosen > 0 ? sums[chosen - 1] : 0.0;
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + chosen;
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

void stream(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

void stream_two(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  std::memcpy(also_to, from, bytes);
}

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable{"portable", power<2>, weigh<2>, descend, stream, stream_two};

}  // namespace rlv2v

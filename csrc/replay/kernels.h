// The buffer's inner loops, once for each instruction set; all give the same bits, and the CPU decides which runs.
//
// No multiply-add is fused and every sum has one order, so that a saved buffer draws the same samples on another machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rlv2v {

constexpr std::size_t kFanout = 8;      // children of an inner node: f64 prefix sums, one cache line
constexpr std::size_t kLeafGroup = 16;  // f32 leaves under the lowest inner level, one cache line

// An inner node of the sum tree, three cache lines: what a descent reads, what an update reads, and the rest.
struct alignas(64) Node {
  double prefix[kFanout];       // running sums of the children
  double sum[kFanout];          // the children's sums
  std::uint32_t high[kFanout];  // 2^32 - bits of the least positive leaf below each child; 0: none
  std::uint32_t stamp;          // the last update that touched this node
  std::uint32_t touched;        // which children it changed, by bit
  std::uint32_t padding[6];
};

struct Kernels {
  const char* name;

  // out[k] = x[k]^exponent for x[k] 0 or normal, exponent in (0, 1]; 0^exponent = 0, x^1 = x. Within one unit of f32's last place.
  void (*power)(const float* x, float* out, std::size_t count, double exponent);

  // out[k] = (low / leaves[k])^exponent for 0 < low <= leaves[k]: importance weights, in (0, 1], 1 where leaf = low.
  void (*weigh)(const float* leaves, float* out, std::size_t count, double low, double exponent);

  // One level down for a batch: node[k] becomes its child that holds point[k], and point[k] what remains in that child.
  // A child without weight is never chosen. Asks for the first line of the children, which lie below_bytes apart.
  void (*descend)(const Node* nodes, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
                  std::size_t count);

  // Copies bytes past the caches, which a large batch would only sweep clean. to and bytes: multiples of 64.
  void (*stream)(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes);
  // The same to two places, reading once.
  void (*stream_two)(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes);
};

// Those that this CPU can run, the plainest first; the last is used.
const std::vector<const Kernels*>& available_kernels();
inline const Kernels& kernels() {
  static const Kernels& best = *available_kernels().back();
  return best;
}

}  // namespace rlv2v

// Sum tree over f32 leaves: draws leaf i with probability leaf[i] / total in O(log n).
//
//   sum of a group of 16 leaves: in f64 by halves, leaf_k + leaf_{k+8}, of those k + 4, then k + 2, then k + 1;
//   prefix_j = ((sum_0 + sum_1) + ...) + sum_j, j < 8
// Source: Schaul et al. 2016, arXiv:1511.05952, appendix B.2.1. A node is always recomputed from its children and never
// added to, so the tree is a function of its leaves alone: any history of updates equals a rebuild, bit for bit.
// Prefixes are summed in order, so they never fall, and a child without weight never spans a point.
// Memory: 4 bytes a leaf and 192 for each 128 leaves, each 1024, and so on: 5.7 bytes a leaf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "replay/kernels.h"
#include "replay/pages.h"

namespace rlv2v {

class SumTree {
 public:
  // All leaves zero. Throws std::invalid_argument when num_leaves is 0 or above 2^31.
  explicit SumTree(std::size_t num_leaves);

  std::size_t num_leaves() const noexcept { return num_leaves_; }
  float leaf(std::size_t index) const noexcept { return leaves_[index]; }
  double total() const noexcept { return levels_.back()[0].prefix[kFanout - 1]; }
  // The least positive leaf; 0 when there is none.
  float least_positive() const noexcept;
  std::size_t bytes_used() const noexcept;

  // Asks for the memory that set(index, ...) and refresh() touch.
  void prefetch(std::size_t index) const noexcept {
    __builtin_prefetch(leaves_.data() + index, 1);
    const Node& node = levels_[0][index / (kLeafGroup * kFanout)];
    __builtin_prefetch(&node.prefix, 1);
    __builtin_prefetch(&node.sum, 1);
    __builtin_prefetch(&node.high, 1);
  }
  // Writes a leaf; the tree is whole again after refresh(). Preconditions (the buffer checks what users give):
  // index < num_leaves, value 0 or normal.
  void set(std::size_t index, float value) noexcept {
    leaves_[index] = value;
    num_touched_ = touch(levels_[0].data(), static_cast<std::uint32_t>(index / kLeafGroup), num_touched_);
  }
  // Recomputes the nodes above the leaves that were set, each once.
  void refresh() noexcept;

  // Replaces the first count leaves and zeroes the rest.
  void assign(const float* values, std::size_t count) noexcept;

  // index[k] = the leaf whose span of the running sum holds point[k], value[k] its weight; a point at or past the total
  // (which rounding can make) gives the last positive leaf. A leaf of zero is never returned. point is overwritten.
  // Precondition: total() > 0.
  void find(double* point, std::uint32_t* index, float* value, std::size_t count) const noexcept;

  // True when every node equals its children's sums and minima, bit for bit.
  bool consistent() const;
  // True when the nodes of both trees are the same, bit for bit.
  bool same_nodes(const SumTree& other) const;

 private:
  // Marks a child as changed; lists its node once, and returns how many are listed.
  std::size_t touch(Node* nodes, std::uint32_t child, std::size_t listed) noexcept {
    const auto parent = child / static_cast<std::uint32_t>(kFanout);
    Node& node = nodes[parent];
    if (node.stamp != stamp_) {
      node.stamp = stamp_;
      node.touched = 0;
      touched_[listed++] = parent;
    }
    node.touched |= 1U << (child % kFanout);
    return listed;
  }
  void sum_group(Node& node, std::size_t group) const noexcept;
  static void sum_node(Node& node) noexcept;
  static std::uint32_t highest(const Node& node) noexcept;
  void next_stamp() noexcept;

  std::size_t num_leaves_;
  PageArray<float> leaves_;               // padded with zeros to whole groups
  std::vector<PageArray<Node>> levels_;   // levels_[0] is above the groups, levels_.back() is the root
  std::uint32_t stamp_ = 1;               // of the update that is under way
  std::size_t num_touched_ = 0;
  PageArray<std::uint32_t> touched_;      // nodes of levels_[0] with a leaf set since the last refresh()
};

}  // namespace rlv2v

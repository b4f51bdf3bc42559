// Sum tree over f32 leaves: draws leaf i with probability leaf[i] / total in O(log n).
//
//   sums[0][g] = total of 16 leaves, sums[k + 1][n] = total of 8 sums of level k, all in f64; total: see kernels.h
// Source: Schaul et al. 2016, arXiv:1511.05952, appendix B.2.1. A sum is always recomputed from its children and never
// added to, so the tree is a function of its leaves alone: any history of updates equals a rebuild, bit for bit.
// Memory: 4 bytes a leaf, and 12 for each 16 leaves, each 128, and so on: 4.9 bytes a leaf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pages.h"
#include "replay/kernels.h"

namespace rlv2v {

class SumTree {
 public:
  // All leaves are zero. Throws std::invalid_argument if num_leaves is 0 or above 2^31.
  explicit SumTree(std::size_t num_leaves);

  std::size_t num_leaves() const noexcept { return num_leaves_; }
  float leaf(std::size_t index) const noexcept { return leaves_[index]; }
  double total() const noexcept { return levels_.back().sums[0]; }
  // Returns the smallest positive leaf; 0 if there is none.
  float min_positive() const noexcept;
  std::size_t bytes_used() const noexcept;

  // Prefetches the memory that set(index, ...) and refresh() touch.
  void prefetch(std::size_t index) const noexcept {
    const std::size_t group = index / kLeafGroup;
    __builtin_prefetch(leaves_.data() + index, 1);
    __builtin_prefetch(levels_[0].sums.data() + group, 1);
    __builtin_prefetch(levels_[0].min_keys.data() + group, 1);
  }
  // Writes a leaf; the sums are right again after refresh(). Preconditions (the buffer checks what users pass):
  // index < num_leaves, value 0 or normal.
  void set(std::size_t index, float value) noexcept {
    leaves_[index] = value;
    const std::size_t group = index / kLeafGroup;
    std::uint8_t& dirty = dirty_groups_[group / kFanout];
    if (dirty == 0) dirty_nodes_[num_dirty_nodes_++] = static_cast<std::uint32_t>(group / kFanout);
    dirty |= static_cast<std::uint8_t>(1U << group % kFanout);
  }
  // Recomputes the sums above the leaves that were set, each once.
  void refresh() noexcept;

  // Replaces the first count leaves and zeroes the rest.
  void assign(const float* values, std::size_t count) noexcept;

  // index[k] = the leaf whose span of the running sum holds point[k], value[k] its weight. A point at or past the total
  // (which rounding can make) gives the last positive leaf; a leaf of zero is never returned. point is overwritten.
  // Precondition: total() > 0.
  void find(double* point, std::uint32_t* index, float* value, std::size_t count) const noexcept;

  // Returns whether every sum and key equals that of a rebuild, bit for bit; for tests.
  bool consistent() const;

 private:
  // One entry for each group of leaves (level 0), each node of 8 of those (level 1), and so on; the last level has one
  // entry, of the complete tree. Padded with zeros to complete nodes.
  struct Level {
    explicit Level(std::size_t entries) : sums(entries), min_keys(entries), queued(entries / kFanout) {}
    PageArray<double> sums;
    PageArray<std::uint32_t> min_keys;  // see Kernels::sum_leaves
    PageArray<std::uint8_t> queued;     // by node of this level: 1 while refresh() has it in its queue
  };

  std::size_t num_leaves_;
  PageArray<float> leaves_;  // padded with zeros to complete nodes of level 0
  std::vector<Level> levels_;
  PageArray<std::uint8_t> dirty_groups_;  // by node of level 0: bit k if its group k was set since the last refresh()
  PageArray<std::uint32_t> dirty_nodes_;  // those with a bit set
  std::size_t num_dirty_nodes_ = 0;
};

}  // namespace rlv2v

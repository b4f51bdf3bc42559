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

#include "replay/kernels.h"
#include "pages.h"

namespace rlv2v {

class SumTree {
 public:
  // All leaves zero. Throws std::invalid_argument when num_leaves is 0 or above 2^31.
  explicit SumTree(std::size_t num_leaves);

  std::size_t num_leaves() const noexcept { return num_leaves_; }
  float leaf(std::size_t index) const noexcept { return leaves_[index]; }
  double total() const noexcept { return levels_.back().sums[0]; }
  // The least positive leaf; 0 when there is none.
  float least_positive() const noexcept;
  std::size_t bytes_used() const noexcept;

  // Asks for the memory that set(index, ...) and refresh() touch.
  void prefetch(std::size_t index) const noexcept {
    const std::size_t group = index / kLeafGroup;
    __builtin_prefetch(leaves_.data() + index, 1);
    __builtin_prefetch(levels_[0].sums.data() + group, 1);
    __builtin_prefetch(levels_[0].highs.data() + group, 1);
  }
  // Writes a leaf; the tree is whole again after refresh(). Preconditions (the buffer checks what users give):
  // index < num_leaves, value 0 or normal.
  void set(std::size_t index, float value) noexcept {
    leaves_[index] = value;
    const std::size_t group = index / kLeafGroup;
    std::uint8_t& changed = changed_[group / kFanout];
    if (changed == 0) listed_[num_listed_++] = static_cast<std::uint32_t>(group / kFanout);
    changed |= static_cast<std::uint8_t>(1U << group % kFanout);
  }
  // Recomputes the sums above the leaves that were set, each once.
  void refresh() noexcept;

  // Replaces the first count leaves and zeroes the rest.
  void assign(const float* values, std::size_t count) noexcept;

  // index[k] = the leaf whose span of the running sum holds point[k], value[k] its weight; a point at or past the total
  // (which rounding can make) gives the last positive leaf. A leaf of zero is never returned. point is overwritten.
  // Precondition: total() > 0.
  void find(double* point, std::uint32_t* index, float* value, std::size_t count) const noexcept;

  // True when every sum and high equals that of a rebuild, bit for bit.
  bool consistent() const;

 private:
  // What is known of each group of leaves (level 0), each node of 8 of those (level 1), and so on; the last has one entry,
  // of the whole tree. Padded with zeros to whole nodes.
  struct Level {
    explicit Level(std::size_t entries) : sums(entries), highs(entries), listed(entries / kFanout) {}
    PageArray<double> sums;
    PageArray<std::uint32_t> highs;  // see Kernels::sum_leaves
    PageArray<std::uint8_t> listed;  // by node of this level: 1 while refresh() has it on its list
  };

  std::size_t num_leaves_;
  PageArray<float> leaves_;  // padded with zeros to whole nodes of level 0
  std::vector<Level> levels_;
  PageArray<std::uint8_t> changed_;        // by node of level 0: bit k for its group k, set since the last refresh()
  PageArray<std::uint32_t> listed_;        // those with a bit set
  std::size_t num_listed_ = 0;
};

}  // namespace rlv2v

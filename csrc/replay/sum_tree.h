// Sum tree over f32 leaves: draws leaf i with probability leaf[i] / total in O(log n).
//
//   node[k][j] = ((child_0 + child_1) + ...) + child_7   in f64, children in order;  low[k][j] = least positive child
// Source: Schaul et al. 2016, arXiv:1511.05952, appendix B.2.1. A node is always recomputed from its children and never
// added to, so the tree is a function of its leaves alone: any history of updates equals a rebuild, bit for bit.
// Memory: 4 bytes a leaf and 12 bytes for each group of eight, on every level.
#pragma once

#include <cstddef>
#include <vector>

namespace rlv2v {

class SumTree {
 public:
  static constexpr std::size_t kFanout = 8;

  // All leaves zero. Throws std::invalid_argument when num_leaves is 0.
  explicit SumTree(std::size_t num_leaves);

  std::size_t num_leaves() const noexcept { return num_leaves_; }
  float leaf(std::size_t index) const noexcept { return leaves_[index]; }
  double total() const noexcept { return levels_.back().sum[0]; }
  // The least positive leaf; +infinity when there is none.
  float least_positive() const noexcept { return levels_.back().low[0]; }

  std::size_t bytes_used() const noexcept;

  // leaf[indices[k]] = values[k] for k < count, the last of a repeated index winning.
  // Preconditions (the buffer checks what users give): indices < num_leaves, values finite and >= 0.
  void update(const std::size_t* indices, const float* values, std::size_t count);

  // Replaces the first count leaves and zeroes the rest.
  void assign(const float* values, std::size_t count);

  // out[k] = the leaf whose span of the running sum holds points[k]; a point at or past the total (which rounding can
  // make) gives the last positive leaf. A leaf of zero is never returned. Precondition: total() > 0.
  void find(const double* points, std::size_t* out, std::size_t count) const noexcept;

  // True when every node equals its children's sum and minimum, bit for bit.
  bool consistent() const;

 private:
  struct Level {
    std::vector<double> sum;
    std::vector<float> low;
  };
  struct Node {
    double sum;
    float low;
  };

  Node from_children(std::size_t level, std::size_t index) const noexcept;
  void recompute(std::size_t level, std::size_t index) noexcept;
  std::size_t find_one(double point) const noexcept;

  std::size_t num_leaves_;
  std::vector<float> leaves_;   // padded with zeros to a multiple of kFanout
  std::vector<Level> levels_;   // levels_[0] sums the leaves, levels_.back() is the root
  std::vector<std::size_t> touched_;
};

}  // namespace rlv2v

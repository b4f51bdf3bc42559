#include "replay/sum_tree.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rlv2v {
namespace {

constexpr std::size_t kMostLeaves = std::size_t{1} << 31;

std::size_t parents_of(std::size_t count) { return (count + kFanout - 1) / kFanout; }

// 2^32 - the bits of a positive float: higher for a lower one, and 0 for 0.
std::uint32_t high_of(float leaf) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &leaf, sizeof bits);
  return 0U - bits;
}

}  // namespace

SumTree::SumTree(std::size_t num_leaves) : num_leaves_(num_leaves) {
  if (num_leaves == 0 || num_leaves > kMostLeaves) {
    throw std::invalid_argument("sum tree: expected 1.." + std::to_string(kMostLeaves) + " leaves, got " +
                                std::to_string(num_leaves));
  }
  std::size_t nodes = parents_of((num_leaves + kLeafGroup - 1) / kLeafGroup);
  leaves_ = PageArray<float>(nodes * kFanout * kLeafGroup);
  touched_ = PageArray<std::uint32_t>(nodes);
  levels_.emplace_back(nodes);
  while (nodes > 1) {
    nodes = parents_of(nodes);
    levels_.emplace_back(nodes);
  }
}

float SumTree::least_positive() const noexcept {
  const std::uint32_t bits = 0U - highest(levels_.back()[0]);
  float least = 0.0F;
  std::memcpy(&least, &bits, sizeof least);
  return least;
}

void SumTree::sum_group(Node& node, std::size_t group) const noexcept {
  const float* leaves = leaves_.data() + group * kLeafGroup;
  double lanes[kLeafGroup / 2];
  std::uint32_t high = 0;
  for (std::size_t k = 0; k < kLeafGroup; ++k) high = std::max(high, high_of(leaves[k]));
  for (std::size_t k = 0; k < 8; ++k) lanes[k] = static_cast<double>(leaves[k]) + static_cast<double>(leaves[k + 8]);
  for (std::size_t k = 0; k < 4; ++k) lanes[k] += lanes[k + 4];
  node.sum[group % kFanout] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  node.high[group % kFanout] = high;
}

void SumTree::sum_node(Node& node) noexcept {
  double before = 0.0;
  for (std::size_t k = 0; k < kFanout; ++k) {
    before += node.sum[k];
    node.prefix[k] = before;
  }
}

std::uint32_t SumTree::highest(const Node& node) noexcept { return *std::max_element(node.high, node.high + kFanout); }

void SumTree::next_stamp() noexcept {
  num_touched_ = 0;
  if (++stamp_ != 0) return;
  for (PageArray<Node>& level : levels_) {
    for (std::size_t node = 0; node < level.size(); ++node) level[node].stamp = 0;
  }
  stamp_ = 1;
}

void SumTree::refresh() noexcept {
  std::size_t count = num_touched_;
  if (count == 0) return;
  for (std::size_t k = 0; k < count; ++k) {
    Node& node = levels_[0][touched_[k]];
    for (std::uint32_t left = node.touched; left != 0; left &= left - 1) {
      sum_group(node, touched_[k] * kFanout + static_cast<std::size_t>(__builtin_ctz(left)));
    }
    sum_node(node);
  }
  for (std::size_t level = 1; level < levels_.size(); ++level) {
    const Node* below = levels_[level - 1].data();
    Node* nodes = levels_[level].data();
    std::size_t listed = 0;
    for (std::size_t k = 0; k < count; ++k) {  // the list is overwritten from its start, behind the reading
      const std::uint32_t child = touched_[k];
      listed = touch(nodes, child, listed);
      nodes[child / kFanout].sum[child % kFanout] = below[child].prefix[kFanout - 1];
      nodes[child / kFanout].high[child % kFanout] = highest(below[child]);
    }
    count = listed;
    for (std::size_t k = 0; k < count; ++k) sum_node(nodes[touched_[k]]);
  }
  next_stamp();
}

void SumTree::assign(const float* values, std::size_t count) noexcept {
  std::copy(values, values + count, leaves_.data());
  std::fill(leaves_.data() + count, leaves_.data() + leaves_.size(), 0.0F);
  for (std::size_t node = 0; node < levels_[0].size(); ++node) {
    num_touched_ = touch(levels_[0].data(), static_cast<std::uint32_t>(node * kFanout), num_touched_);
    levels_[0][node].touched = (1U << kFanout) - 1;
  }
  refresh();
}

void SumTree::find(double* point, std::uint32_t* index, float* value, std::size_t count) const noexcept {
  const Kernels& run = kernels();
  std::fill(index, index + count, 0U);
  for (std::size_t level = levels_.size(); level-- > 1;) {
    run.descend(levels_[level].data(), levels_[level - 1].data(), sizeof(Node), index, point, count);
  }
  run.descend(levels_[0].data(), leaves_.data(), kLeafGroup * sizeof(float), index, point, count);
  for (std::size_t k = 0; k < count; ++k) {
    const float* leaves = leaves_.data() + std::size_t{index[k]} * kLeafGroup;
    double before = 0.0;
    std::uint32_t passed = 0;
    std::uint32_t positive = 0;  // the last leaf with weight
    for (std::uint32_t leaf = 0; leaf < kLeafGroup; ++leaf) {
      before += static_cast<double>(leaves[leaf]);
      passed += before <= point[k] ? 1U : 0U;
      positive = leaves[leaf] > 0.0F ? leaf : positive;
    }
    const std::uint32_t chosen = std::min(passed, positive);
    index[k] = index[k] * static_cast<std::uint32_t>(kLeafGroup) + chosen;
    value[k] = leaves[chosen];
  }
}

std::size_t SumTree::bytes_used() const noexcept {
  std::size_t bytes = leaves_.bytes() + touched_.bytes();
  for (const PageArray<Node>& level : levels_) bytes += level.bytes();
  return bytes;
}

bool SumTree::same_nodes(const SumTree& other) const {
  if (levels_.size() != other.levels_.size()) return false;
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    if (levels_[level].size() != other.levels_[level].size()) return false;
    for (std::size_t index = 0; index < levels_[level].size(); ++index) {
      const Node& mine = levels_[level][index];
      const Node& theirs = other.levels_[level][index];
      if (std::memcmp(mine.prefix, theirs.prefix, sizeof mine.prefix) != 0) return false;
      if (std::memcmp(mine.sum, theirs.sum, sizeof mine.sum) != 0) return false;
      if (std::memcmp(mine.high, theirs.high, sizeof mine.high) != 0) return false;
    }
  }
  return true;
}

bool SumTree::consistent() const {
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    for (std::size_t index = 0; index < levels_[level].size(); ++index) {
      const Node& stored = levels_[level][index];
      Node found = stored;
      for (std::size_t k = 0; k < kFanout; ++k) {
        const std::size_t child = index * kFanout + k;
        if (level == 0) {
          sum_group(found, child);
        } else if (child < levels_[level - 1].size()) {
          found.sum[k] = levels_[level - 1][child].prefix[kFanout - 1];
          found.high[k] = highest(levels_[level - 1][child]);
        } else {
          found.sum[k] = 0.0;
          found.high[k] = 0;
        }
      }
      sum_node(found);
      if (std::memcmp(&found, &stored, sizeof found) != 0) return false;
    }
  }
  return num_touched_ == 0;
}

}  // namespace rlv2v

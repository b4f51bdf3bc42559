#include "replay/sum_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace rlv2v {
namespace {

constexpr float kNone = std::numeric_limits<float>::infinity();

std::size_t groups_of(std::size_t count) { return (count + SumTree::kFanout - 1) / SumTree::kFanout; }

}  // namespace

SumTree::SumTree(std::size_t num_leaves) : num_leaves_(num_leaves) {
  if (num_leaves == 0) throw std::invalid_argument("sum tree: expected at least 1 leaf, got 0");
  leaves_.assign(groups_of(num_leaves) * kFanout, 0.0F);
  std::size_t nodes = leaves_.size();
  do {
    nodes = groups_of(nodes);
    // All but the root are padded to whole groups, so that every node has eight children.
    const std::size_t padded = nodes == 1 ? 1 : groups_of(nodes) * kFanout;
    levels_.push_back({std::vector<double>(padded, 0.0), std::vector<float>(padded, kNone)});
  } while (nodes > 1);
  touched_.reserve(1);  // so that updating one leaf cannot fail
}

SumTree::Node SumTree::from_children(std::size_t level, std::size_t index) const noexcept {
  const std::size_t first = index * kFanout;
  Node node{0.0, kNone};
  for (std::size_t child = first; child < first + kFanout; ++child) {
    if (level == 0) {
      const float value = leaves_[child];
      node.sum += static_cast<double>(value);
      if (value > 0.0F) node.low = std::min(node.low, value);
    } else {
      node.sum += levels_[level - 1].sum[child];
      node.low = std::min(node.low, levels_[level - 1].low[child]);
    }
  }
  return node;
}

void SumTree::recompute(std::size_t level, std::size_t index) noexcept {
  const Node node = from_children(level, index);
  levels_[level].sum[index] = node.sum;
  levels_[level].low[index] = node.low;
}

void SumTree::update(const std::size_t* indices, const float* values, std::size_t count) {
  touched_.resize(count);
  for (std::size_t k = 0; k < count; ++k) {
    leaves_[indices[k]] = values[k];
    touched_[k] = indices[k];
  }
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    for (std::size_t& index : touched_) index /= kFanout;
    touched_.erase(std::unique(touched_.begin(), touched_.end()), touched_.end());
    for (const std::size_t index : touched_) recompute(level, index);
  }
}

void SumTree::assign(const float* values, std::size_t count) {
  std::copy(values, values + count, leaves_.begin());
  std::fill(leaves_.begin() + static_cast<std::ptrdiff_t>(count), leaves_.end(), 0.0F);
  std::size_t nodes = leaves_.size();
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    nodes = groups_of(nodes);
    for (std::size_t index = 0; index < nodes; ++index) recompute(level, index);
  }
}

std::size_t SumTree::find_one(double point) const noexcept {
  std::size_t index = 0;
  for (std::size_t level = levels_.size(); level-- > 0;) {
    const std::size_t first = index * kFanout;
    std::size_t chosen = first;
    double before = 0.0;
    double chosen_before = 0.0;
    for (std::size_t child = first; child < first + kFanout; ++child) {
      const double value = level == 0 ? static_cast<double>(leaves_[child]) : levels_[level - 1].sum[child];
      if (value <= 0.0) continue;
      chosen = child;
      chosen_before = before;
      before += value;
      if (point < before) break;
    }
    point -= chosen_before;
    index = chosen;
  }
  return index;
}

void SumTree::find(const double* points, std::size_t* out, std::size_t count) const noexcept {
  for (std::size_t k = 0; k < count; ++k) out[k] = find_one(points[k]);
}

std::size_t SumTree::bytes_used() const noexcept {
  std::size_t bytes = leaves_.size() * sizeof(float);
  for (const Level& level : levels_) bytes += level.sum.size() * (sizeof(double) + sizeof(float));
  return bytes;
}

bool SumTree::consistent() const {
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    const Level& stored = levels_[level];
    const std::size_t children = level == 0 ? leaves_.size() : levels_[level - 1].sum.size();
    for (std::size_t index = 0; index < groups_of(children); ++index) {
      const Node node = from_children(level, index);
      if (std::memcmp(&node.sum, &stored.sum[index], sizeof node.sum) != 0) return false;
      if (std::memcmp(&node.low, &stored.low[index], sizeof node.low) != 0) return false;
    }
  }
  return true;
}

}  // namespace rlv2v

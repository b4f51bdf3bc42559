#include "replay/sum_tree.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rlv2v {
namespace {

constexpr std::size_t kMaxLeaves = std::size_t{1} << 31;
constexpr std::size_t kChunk = 256;

std::size_t ceil_div(std::size_t count, std::size_t by) { return (count + by - 1) / by; }

}  // namespace

SumTree::SumTree(std::size_t num_leaves) : num_leaves_(num_leaves) {
  if (num_leaves == 0 || num_leaves > kMaxLeaves) {
    throw std::invalid_argument("sum tree: expected 1.." + std::to_string(kMaxLeaves) + " leaves, got " +
                                std::to_string(num_leaves));
  }
  std::size_t nodes = ceil_div(ceil_div(num_leaves, kLeafGroup), kFanout);
  leaves_ = PageArray<float>(nodes * kFanout * kLeafGroup);
  dirty_groups_ = PageArray<std::uint8_t>(nodes);
  dirty_nodes_ = PageArray<std::uint32_t>(nodes);
  for (levels_.emplace_back(nodes * kFanout); nodes > 1; levels_.emplace_back(nodes * kFanout)) {
    nodes = ceil_div(nodes, kFanout);
  }
  levels_.emplace_back(kFanout);
}

float SumTree::min_positive() const noexcept {
  const std::uint32_t bits = 0U - levels_.back().min_keys[0];
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void SumTree::refresh() noexcept {
  const Kernels& run = kernels();
  std::size_t count = num_dirty_nodes_;
  if (count == 0) return;
  std::uint32_t groups[kChunk + kFanout];
  std::size_t num_groups = 0;
  for (std::size_t k = 0; k < count; ++k) {
    const std::uint32_t node = dirty_nodes_[k];
    for (std::uint32_t bits = dirty_groups_[node]; bits != 0; bits &= bits - 1) {
      groups[num_groups++] =
          node * static_cast<std::uint32_t>(kFanout) + static_cast<std::uint32_t>(__builtin_ctz(bits));
    }
    dirty_groups_[node] = 0;
    if (num_groups >= kChunk || k + 1 == count) {
      run.sum_leaves(leaves_.data(), groups, num_groups, levels_[0].sums.data(), levels_[0].min_keys.data());
      num_groups = 0;
    }
  }
  for (std::size_t depth = 0;; ++depth) {
    const Level& below = levels_[depth];
    const Level& level = levels_[depth + 1];
    run.sum_nodes(below.sums.data(), below.min_keys.data(), dirty_nodes_.data(), count, level.sums.data(),
                  level.min_keys.data());
    if (depth + 2 == levels_.size()) break;
    std::size_t num_parents = 0;  // the queue is overwritten from its start, behind the reading
    for (std::size_t k = 0; k < count; ++k) {
      const std::uint32_t parent = dirty_nodes_[k] / static_cast<std::uint32_t>(kFanout);
      dirty_nodes_[num_parents] = parent;
      num_parents += level.queued[parent] ^ 1U;
      level.queued[parent] = 1;
    }
    for (std::size_t k = 0; k < num_parents; ++k) level.queued[dirty_nodes_[k]] = 0;
    count = num_parents;
  }
  num_dirty_nodes_ = 0;
}

void SumTree::assign(const float* values, std::size_t count) noexcept {
  std::copy(values, values + count, leaves_.data());
  std::fill(leaves_.data() + count, leaves_.data() + leaves_.size(), 0.0F);
  num_dirty_nodes_ = dirty_groups_.size();
  for (std::size_t node = 0; node < num_dirty_nodes_; ++node) {
    dirty_nodes_[node] = static_cast<std::uint32_t>(node);
    dirty_groups_[node] = (1U << kFanout) - 1;
  }
  refresh();
}

void SumTree::find(double* point, std::uint32_t* index, float* value, std::size_t count) const noexcept {
  const Kernels& run = kernels();
  std::fill(index, index + count, 0U);
  for (std::size_t level = levels_.size() - 1; level-- > 1;) {
    run.descend(levels_[level].sums.data(), levels_[level - 1].sums.data(), kFanout * sizeof(double), index, point,
                count);
  }
  run.descend(levels_[0].sums.data(), leaves_.data(), kLeafGroup * sizeof(float), index, point, count);
  run.select_leaf(leaves_.data(), point, index, value, count);
}

std::size_t SumTree::bytes_used() const noexcept {
  std::size_t bytes = leaves_.bytes() + dirty_groups_.bytes() + dirty_nodes_.bytes();
  for (const Level& level : levels_) bytes += level.sums.bytes() + level.min_keys.bytes() + level.queued.bytes();
  return bytes;
}

bool SumTree::consistent() const {
  SumTree rebuilt(num_leaves_);
  rebuilt.assign(leaves_.data(), num_leaves_);
  const auto same = [](const auto& a, const auto& b) { return std::memcmp(a.data(), b.data(), a.bytes()) == 0; };
  bool all = num_dirty_nodes_ == 0;
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    all = all && same(levels_[level].sums, rebuilt.levels_[level].sums) &&
          same(levels_[level].min_keys, rebuilt.levels_[level].min_keys);
  }
  return all;
}

}  // namespace rlv2v

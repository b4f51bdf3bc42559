#include "replay/sum_tree.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rlv2v {
namespace {

constexpr std::size_t kMostLeaves = std::size_t{1} << 31;
constexpr std::size_t kChunk = 256;

std::size_t divided_up(std::size_t count, std::size_t by) { return (count + by - 1) / by; }

}  // namespace

SumTree::SumTree(std::size_t num_leaves) : num_leaves_(num_leaves) {
  if (num_leaves == 0 || num_leaves > kMostLeaves) {
    throw std::invalid_argument("sum tree: expected 1.." + std::to_string(kMostLeaves) + " leaves, got " +
                                std::to_string(num_leaves));
  }
  std::size_t nodes = divided_up(divided_up(num_leaves, kLeafGroup), kFanout);
  leaves_ = PageArray<float>(nodes * kFanout * kLeafGroup);
  changed_ = PageArray<std::uint8_t>(nodes);
  listed_ = PageArray<std::uint32_t>(nodes);
  for (levels_.emplace_back(nodes * kFanout); nodes > 1; levels_.emplace_back(nodes * kFanout)) {
    nodes = divided_up(nodes, kFanout);
  }
  levels_.emplace_back(kFanout);
}

float SumTree::least_positive() const noexcept {
  const std::uint32_t bits = 0U - levels_.back().highs[0];
  float least = 0.0F;
  std::memcpy(&least, &bits, sizeof least);
  return least;
}

void SumTree::refresh() noexcept {
  const Kernels& run = kernels();
  std::size_t count = num_listed_;
  if (count == 0) return;
  std::uint32_t groups[kChunk + kFanout];
  std::size_t num_groups = 0;
  for (std::size_t k = 0; k < count; ++k) {
    const std::uint32_t node = listed_[k];
    for (std::uint32_t left = changed_[node]; left != 0; left &= left - 1) {
      groups[num_groups++] = node * static_cast<std::uint32_t>(kFanout) + static_cast<std::uint32_t>(__builtin_ctz(left));
    }
    changed_[node] = 0;
    if (num_groups >= kChunk || k + 1 == count) {
      run.sum_leaves(leaves_.data(), groups, num_groups, levels_[0].sums.data(), levels_[0].highs.data());
      num_groups = 0;
    }
  }
  for (std::size_t at = 0;; ++at) {
    const Level& below = levels_[at];
    const Level& level = levels_[at + 1];
    run.sum_nodes(below.sums.data(), below.highs.data(), listed_.data(), count, level.sums.data(), level.highs.data());
    if (at + 2 == levels_.size()) break;
    std::size_t parents = 0;  // the list is overwritten from its start, behind the reading
    for (std::size_t k = 0; k < count; ++k) {
      const std::uint32_t parent = listed_[k] / static_cast<std::uint32_t>(kFanout);
      listed_[parents] = parent;
      parents += level.listed[parent] ^ 1U;
      level.listed[parent] = 1;
    }
    for (std::size_t k = 0; k < parents; ++k) level.listed[listed_[k]] = 0;
    count = parents;
  }
  num_listed_ = 0;
}

void SumTree::assign(const float* values, std::size_t count) noexcept {
  std::copy(values, values + count, leaves_.data());
  std::fill(leaves_.data() + count, leaves_.data() + leaves_.size(), 0.0F);
  num_listed_ = changed_.size();
  for (std::size_t node = 0; node < num_listed_; ++node) {
    listed_[node] = static_cast<std::uint32_t>(node);
    changed_[node] = (1U << kFanout) - 1;
  }
  refresh();
}

void SumTree::find(double* point, std::uint32_t* index, float* value, std::size_t count) const noexcept {
  const Kernels& run = kernels();
  std::fill(index, index + count, 0U);
  for (std::size_t level = levels_.size() - 1; level-- > 1;) {
    run.descend(levels_[level].sums.data(), levels_[level - 1].sums.data(), kFanout * sizeof(double), index, point, count);
  }
  run.descend(levels_[0].sums.data(), leaves_.data(), kLeafGroup * sizeof(float), index, point, count);
  run.pick(leaves_.data(), point, index, value, count);
}

std::size_t SumTree::bytes_used() const noexcept {
  std::size_t bytes = leaves_.bytes() + changed_.bytes() + listed_.bytes();
  for (const Level& level : levels_) bytes += level.sums.bytes() + level.highs.bytes() + level.listed.bytes();
  return bytes;
}

bool SumTree::consistent() const {
  SumTree rebuilt(num_leaves_);
  rebuilt.assign(leaves_.data(), num_leaves_);
  const auto same = [](const auto& mine, const auto& theirs) {
    return mine.size() == theirs.size() && std::memcmp(mine.data(), theirs.data(), mine.bytes()) == 0;
  };
  bool all = num_listed_ == 0;
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    all = all && same(levels_[level].sums, rebuilt.levels_[level].sums) && same(levels_[level].highs, rebuilt.levels_[level].highs);
  }
  return all;
}

}  // namespace rlv2v

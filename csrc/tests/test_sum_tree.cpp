// Tests the tree against a plain running sum, against its own rebuild, and at the edges of the number range.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "replay/sum_tree.h"

using rlv2v::SumTree;

namespace {

std::size_t find(const SumTree& tree, double point) {
  std::uint32_t index = 0;
  float value = 0.0F;
  tree.find(&point, &index, &value, 1);
  CHECK(value == tree.leaf(index));
  return index;
}

void update(SumTree& tree, std::size_t index, float value) {
  tree.set(index, value);
  tree.refresh();
}

// Values that are small integers make every sum exact, so that the plain search is the definition.
void finds_what_a_running_sum_finds(std::size_t num_leaves) {
  const Draws draws(num_leaves);
  std::vector<float> values(num_leaves);
  double total = 0.0;
  for (std::size_t k = 0; k < num_leaves; ++k) {
    values[k] = static_cast<float>(std::floor(draws.uniform(k) * 4.0));
    total += static_cast<double>(values[k]);
  }
  values[num_leaves / 2] += 1.0F;
  total += 1.0;
  SumTree tree(num_leaves);
  tree.assign(values.data(), values.size());
  CHECK(tree.total() == total);
  CHECK(tree.consistent());

  std::size_t leaf = 0;
  double low = 0.0;
  for (double point = 0.0; point < total; point += 0.25) {
    while (point >= low + static_cast<double>(values[leaf])) low += static_cast<double>(values[leaf++]);
    CHECK(find(tree, point) == leaf);
  }
}

void zeros_are_never_found() {
  SumTree tree(70);
  const std::size_t index = 33;
  const float tiny = std::numeric_limits<float>::min();
  update(tree, index, tiny);
  for (const double point : {0.0, tree.total(), 2.0 * tree.total(), std::numeric_limits<double>::max()}) {
    CHECK(find(tree, point) == index);
  }
  CHECK(tree.min_positive() == tiny);
  update(tree, index, 0.0F);
  CHECK(tree.total() == 0.0);
  CHECK(tree.min_positive() == 0.0F);
}

// A leaf of 2^-45 of the total, at any place, is found at its own point.
void small_leaves_are_reachable() {
  const std::size_t num_leaves = 4096;
  for (std::size_t small = 0; small < num_leaves; small += 13) {
    std::vector<float> values(num_leaves, 1.0F);
    values[small] = std::ldexp(1.0F, -33);  // total is 2^12
    SumTree tree(num_leaves);
    tree.assign(values.data(), values.size());
    const double point = static_cast<double>(small) + std::ldexp(0.5, -33);
    CHECK(find(tree, point) == small);
  }
}

// Weights over 2^45 among zeros: the middle of every span of the exact running sum finds its leaf, though the tree's
// sums round in another order. Long double has 11 bits more than f64.
void rounding_moves_no_span_by_much() {
  const std::size_t num_leaves = 5000;
  const Draws draws(5);
  std::vector<float> values(num_leaves);
  for (std::size_t k = 0; k < num_leaves; ++k) {
    const double u = draws.uniform(k);
    values[k] = u < 0.3 ? 0.0F : static_cast<float>(std::exp2(-33.0 * draws.uniform(num_leaves + k)));
  }
  SumTree tree(num_leaves);
  tree.assign(values.data(), values.size());
  long double low = 0.0L;
  for (std::size_t k = 0; k < num_leaves; ++k) {
    if (values[k] > 0.0F) {
      CHECK(find(tree, static_cast<double>(low + static_cast<long double>(values[k]) / 2.0L)) == k);
    }
    low += static_cast<long double>(values[k]);
  }
}

// 10^7 updates of a million leaves: the tree is its rebuild, bit for bit, and the rebuild is right.
void ten_million_updates_equal_a_rebuild() {
  const std::size_t num_leaves = 1000000;
  const Draws draws(11);
  SumTree tree(num_leaves);
  for (std::uint64_t step = 0; step < 10000000; ++step) {
    const std::uint64_t bits = static_cast<std::uint64_t>(draws.uniform(step) * 0x1p53);
    tree.set(static_cast<std::size_t>(bits % num_leaves), static_cast<float>(bits >> 20) * 0x1p-40F);
    if (step % 256 == 255) tree.refresh();
  }
  tree.refresh();
  CHECK(tree.consistent());  // sums and smallest leaves alike
  double total = 0.0;
  for (std::size_t k = 0; k < num_leaves; ++k) total += static_cast<double>(tree.leaf(k));
  CHECK(std::fabs(tree.total() / total - 1.0) < 1e-12);
}

}  // namespace

int main() {
  for (const std::size_t num_leaves : {1U, 2U, 7U, 8U, 9U, 63U, 64U, 65U, 513U, 1000U}) {
    finds_what_a_running_sum_finds(num_leaves);
  }
  zeros_are_never_found();
  small_leaves_are_reachable();
  rounding_moves_no_span_by_much();
  ten_million_updates_equal_a_rebuild();
  CHECK(throws<std::invalid_argument>([] { SumTree tree(0); }));
  return 0;
}

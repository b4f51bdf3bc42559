// Tests every instruction set of this CPU against the portable one, bit for bit, and that against the C library.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "pages.h"
#include "replay/kernels.h"

namespace {

constexpr std::size_t kCount = 10007;  // no multiple of any vector

std::vector<float> positive_floats() {
  const Draws draws(3);
  std::vector<float> values(kCount);
  for (std::size_t k = 0; k < kCount; ++k) values[k] = static_cast<float>(std::exp2(draws.uniform(k) * 253.0 - 126.0));
  values[0] = std::numeric_limits<float>::min();
  values[1] = std::numeric_limits<float>::max();
  values[2] = 1.0F;
  return values;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void powers_agree(const rlv2v::Kernels& plain, const rlv2v::Kernels& fast) {
  std::vector<float> x = positive_floats();
  const auto low = static_cast<double>(*std::min_element(x.begin(), x.end()));
  for (const double exponent : {0.0, 0.01, 0.4, 0.6, 1.0}) {
    std::vector<float> ours(kCount), theirs(kCount);
    plain.importance_weights(x.data(), ours.data(), kCount, low, exponent);
    fast.importance_weights(x.data(), theirs.data(), kCount, low, exponent);
    CHECK(same(ours, theirs));
    CHECK(ours[0] == 1.0F);
    for (std::size_t k = 0; k < kCount; ++k) {
      const double expected = std::pow(low / static_cast<double>(x[k]), exponent);
      const double smallest = static_cast<double>(std::numeric_limits<float>::min());
      CHECK(ours[k] <= 1.0F);
      CHECK(expected < smallest || std::fabs(static_cast<double>(ours[k]) / expected - 1.0) < 0x1p-23);
    }
    if (exponent == 0.0) continue;
    x[5] = 0.0F;
    plain.power(x.data(), ours.data(), kCount, exponent);
    fast.power(x.data(), theirs.data(), kCount, exponent);
    CHECK(same(ours, theirs) && ours[5] == 0.0F && ours[2] == 1.0F);
    for (std::size_t k = 0; k < kCount; ++k) {
      const double expected = std::pow(static_cast<double>(x[k]), exponent);
      CHECK(k == 5 || std::fabs(static_cast<double>(ours[k]) / expected - 1.0) < 0x1p-23);
      CHECK(exponent != 1.0 || ours[k] == x[k]);
    }
    x[5] = 1.0F;
  }
}

// Half of the summands are zero, but never all of a node or group. Fractions, so that sums round.
template <class Real>
void summands(const rlv2v::PageArray<Real>& into, std::size_t per_node) {
  const Draws draws(4);
  for (std::size_t k = 0; k < into.size(); ++k) {
    const bool zero = draws.uniform(2 * k) < 0.5 && k % per_node != k / per_node % per_node;
    into[k] = static_cast<Real>(zero ? 0.0 : draws.uniform(2 * k + 1) + 1e-3);
  }
}

// The chosen summand is positive, the sum of those in front of it at most the point, and with it more, up to rounding.
template <class Real>
void check_choice(const Real* summands, std::size_t size, std::size_t chosen, double point) {
  const double low = std::accumulate(summands, summands + chosen, 0.0);
  const double high = low + static_cast<double>(summands[chosen]);
  const double total = std::accumulate(summands, summands + size, 0.0);
  CHECK(summands[chosen] > 0 && low <= std::max(point, 0.0) + 1e-13);
  CHECK(high > point - 1e-13 || (point > total - 1e-13 && high > total - 1e-13));
}

void searches_agree(const rlv2v::Kernels& plain, const rlv2v::Kernels& fast) {
  constexpr std::size_t kNodes = 100;
  const Draws draws(5);
  const rlv2v::PageArray<double> sums(kNodes * rlv2v::kFanout);
  const rlv2v::PageArray<float> leaves(kNodes * rlv2v::kLeafGroup);
  summands(sums, rlv2v::kFanout);
  summands(leaves, rlv2v::kLeafGroup);
  std::vector<std::uint32_t> start(kCount);
  std::vector<double> points(kCount);
  for (std::size_t k = 0; k < kCount; ++k) {
    start[k] = static_cast<std::uint32_t>(k % kNodes);
    points[k] = draws.uniform(k) * 10.0;                       // some past the total,
    if (k % 50 == 0) points[k] = -1e-17;                       // some just below 0, as rounding makes,
    if (k % 50 == 1) points[k] = sums[start[k] * 8];           // and some at the very end of a span
    if (k % 50 == 2) points[k] = static_cast<double>(leaves[start[k] * 16]);
  }
  auto ours = start;
  auto theirs = start;
  auto our_points = points;
  auto their_points = points;
  plain.descend(sums.data(), sums.data(), 64, ours.data(), our_points.data(), kCount);
  fast.descend(sums.data(), sums.data(), 64, theirs.data(), their_points.data(), kCount);
  CHECK(ours == theirs && our_points == their_points);
  for (std::size_t k = 0; k < kCount; ++k) {
    CHECK(ours[k] / rlv2v::kFanout == start[k]);
    check_choice(&sums[start[k] * rlv2v::kFanout], rlv2v::kFanout, ours[k] % rlv2v::kFanout, points[k]);
  }
  ours = theirs = start;
  std::vector<float> our_values(kCount), their_values(kCount);
  plain.select_leaf(leaves.data(), points.data(), ours.data(), our_values.data(), kCount);
  fast.select_leaf(leaves.data(), points.data(), theirs.data(), their_values.data(), kCount);
  CHECK(ours == theirs && same(our_values, their_values));
  for (std::size_t k = 0; k < kCount; ++k) {
    CHECK(ours[k] / rlv2v::kLeafGroup == start[k] && our_values[k] == leaves[ours[k]]);
    check_choice(&leaves[start[k] * rlv2v::kLeafGroup], rlv2v::kLeafGroup, ours[k] % rlv2v::kLeafGroup, points[k]);
  }
}

void sums_agree(const rlv2v::Kernels& plain, const rlv2v::Kernels& fast) {
  constexpr std::size_t kGroups = 64;
  const rlv2v::PageArray<float> leaves(kGroups * rlv2v::kLeafGroup);
  summands(leaves, rlv2v::kLeafGroup);
  std::fill(&leaves[0], &leaves[rlv2v::kLeafGroup], 0.0F);
  std::vector<std::uint32_t> all(kGroups);
  for (std::uint32_t k = 0; k < kGroups; ++k) all[k] = k;
  const rlv2v::PageArray<double> sums(kGroups), their_sums(kGroups), totals(kGroups / 8), their_totals(kGroups / 8);
  const rlv2v::PageArray<std::uint32_t> min_keys(kGroups), their_keys(kGroups), tops(kGroups / 8),
      their_tops(kGroups / 8);
  plain.sum_leaves(leaves.data(), all.data(), kGroups, sums.data(), min_keys.data());
  fast.sum_leaves(leaves.data(), all.data(), kGroups, their_sums.data(), their_keys.data());
  plain.sum_nodes(sums.data(), min_keys.data(), all.data(), kGroups / 8, totals.data(), tops.data());
  fast.sum_nodes(sums.data(), min_keys.data(), all.data(), kGroups / 8, their_totals.data(), their_tops.data());
  const auto equal = [](const auto& a, const auto& b) { return std::memcmp(a.data(), b.data(), a.bytes()) == 0; };
  CHECK(equal(sums, their_sums) && equal(min_keys, their_keys) && equal(totals, their_totals) &&
        equal(tops, their_tops));
  CHECK(sums[0] == 0.0 && min_keys[0] == 0);
  for (std::size_t k = 1; k < kGroups; ++k) {
    double sum = 0.0;
    float smallest = std::numeric_limits<float>::max();
    for (std::size_t j = k * rlv2v::kLeafGroup; j < (k + 1) * rlv2v::kLeafGroup; ++j) {
      sum += static_cast<double>(leaves[j]);
      if (leaves[j] > 0.0F) smallest = std::min(smallest, leaves[j]);
    }
    std::uint32_t bits = 0;
    std::memcpy(&bits, &smallest, sizeof bits);
    CHECK(std::fabs(sums[k] / sum - 1.0) < 1e-14 && min_keys[k] == 0U - bits);
    CHECK(tops[k / 8] >= min_keys[k] && totals[k / 8] >= sums[k]);
  }
}

void draws_agree(const rlv2v::Kernels& run) {
  std::vector<double> values(kCount);
  run.uniform(rlv2v::draws_key(9), 77, values.data(), kCount);
  for (std::size_t k = 0; k < kCount; ++k) CHECK(values[k] == rlv2v::uniform_draw(rlv2v::draws_key(9), 77 + k));
}

void copies_agree(const rlv2v::Kernels& run) {
  alignas(64) std::uint8_t to[256] = {};
  alignas(64) std::uint8_t also[256] = {};
  std::uint8_t from[300];
  for (std::size_t k = 0; k < sizeof from; ++k) from[k] = static_cast<std::uint8_t>(k * 7);
  run.stream(to, nullptr, from + 3, 192);
  CHECK(std::memcmp(to, from + 3, 192) == 0 && to[192] == 0);
  run.stream(to, also, from + 5, 256);
  run.fence();
  CHECK(std::memcmp(to, from + 5, 256) == 0 && std::memcmp(also, from + 5, 256) == 0);
}

}  // namespace

int main() {
  const auto& sets = rlv2v::available_kernels();
  for (const rlv2v::Kernels* set : sets) {
    std::printf("%s\n", set->name);
    powers_agree(*sets.front(), *set);
    searches_agree(*sets.front(), *set);
    sums_agree(*sets.front(), *set);
    draws_agree(*set);
    copies_agree(*set);
  }
  return 0;
}

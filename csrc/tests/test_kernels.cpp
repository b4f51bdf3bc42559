// Every instruction set that this CPU has against the plain one, bit for bit, and the plain one against the C library.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "replay/checksum.h"
#include "replay/draws.h"
#include "replay/kernels.h"
#include "replay/pages.h"

namespace {

constexpr std::size_t kCount = 10007;  // no multiple of any vector

std::vector<float> positive_floats() {
  const rlv2v::Draws draws(3);
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
    plain.weigh(x.data(), ours.data(), kCount, low, exponent);
    fast.weigh(x.data(), theirs.data(), kCount, low, exponent);
    CHECK(same(ours, theirs));
    CHECK(ours[0] == 1.0F);
    for (std::size_t k = 0; k < kCount; ++k) {
      const double expected = std::pow(low / static_cast<double>(x[k]), exponent);
      const double least = static_cast<double>(std::numeric_limits<float>::min());
      CHECK(ours[k] <= 1.0F);
      CHECK(expected < least || std::fabs(static_cast<double>(ours[k]) / expected - 1.0) < 0x1p-23);
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

void descents_agree(const rlv2v::Kernels& plain, const rlv2v::Kernels& fast) {
  const rlv2v::Draws draws(4);
  const rlv2v::PageArray<rlv2v::Node> nodes(100);
  for (std::size_t k = 0; k < 100; ++k) {
    double before = 0.0;
    for (std::size_t j = 0; j < rlv2v::kFanout; ++j) {
      const double weight = draws.uniform(k * 8 + j) - 0.5;
      before += j == k % 8 ? 1.0 : std::max(weight, 0.0);  // half of them are zero
      nodes[k].prefix[j] = before;
    }
  }
  std::vector<std::uint32_t> ours(kCount), theirs(kCount);
  std::vector<double> our_points(kCount), their_points(kCount);
  for (std::size_t k = 0; k < kCount; ++k) {
    ours[k] = theirs[k] = static_cast<std::uint32_t>(k % 100);
    our_points[k] = their_points[k] = draws.uniform(1000 + k) * 3.0;
  }
  plain.descend(nodes.data(), nodes.data(), sizeof(rlv2v::Node), ours.data(), our_points.data(), kCount);
  fast.descend(nodes.data(), nodes.data(), sizeof(rlv2v::Node), theirs.data(), their_points.data(), kCount);
  CHECK(ours == theirs && our_points == their_points);
  for (std::size_t k = 0; k < kCount; ++k) {
    const double* prefix = nodes[k % 100].prefix;
    const std::size_t child = ours[k] % 8;
    CHECK(prefix[child] > (child > 0 ? prefix[child - 1] : 0.0));
  }
}

void copies_agree(const rlv2v::Kernels& run) {
  alignas(64) std::uint8_t to[256] = {};
  alignas(64) std::uint8_t also[256] = {};
  std::uint8_t from[300];
  for (std::size_t k = 0; k < sizeof from; ++k) from[k] = static_cast<std::uint8_t>(k * 7);
  run.stream(to, from + 3, 192);
  CHECK(std::memcmp(to, from + 3, 192) == 0 && to[192] == 0);
  run.stream_two(to, also, from + 5, 256);
  CHECK(std::memcmp(to, from + 5, 256) == 0 && std::memcmp(also, from + 5, 256) == 0);
}

// The specification's own examples.
void checksums_are_xxh64() {
  CHECK(rlv2v::checksum(nullptr, 0) == 0xEF46DB3751D8E999ULL);
  const char* text = "abc";
  CHECK(rlv2v::checksum(reinterpret_cast<const std::uint8_t*>(text), 3) == 0x44BC2CF5AD770999ULL);
}

}  // namespace

int main() {
  const auto& sets = rlv2v::available_kernels();
  for (const rlv2v::Kernels* set : sets) {
    powers_agree(*sets.front(), *set);
    descents_agree(*sets.front(), *set);
    copies_agree(*set);
  }
  checksums_are_xxh64();
  return 0;
}

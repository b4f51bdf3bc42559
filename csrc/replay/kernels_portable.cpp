#include <algorithm>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

struct VecPortable {
  static constexpr std::size_t kWidth = 2;
  struct Doubles {
    double lane[8];
  };

  template <class T>
  static Doubles load(const T* from) {
    Doubles x;
    for (std::size_t k = 0; k < 8; ++k) x.lane[k] = static_cast<double>(from[k]);
    return x;
  }
  static Doubles add(Doubles a, const Doubles& b) {
    for (std::size_t k = 0; k < 8; ++k) a.lane[k] += b.lane[k];
    return a;
  }
  static Doubles scan(Doubles p) {
    for (std::size_t step = 1; step < 8; step *= 2) {
      for (std::size_t k = 8; k-- > step;) p.lane[k] += p.lane[k - step];
    }
    return p;
  }
  // The last lane of the scan, by the same additions.
  static double total(const Doubles& x) {
    const double* p = x.lane;
    return ((p[7] + p[6]) + (p[5] + p[4])) + ((p[3] + p[2]) + (p[1] + p[0]));
  }
  static Doubles broadcast_last(Doubles x) {
    std::fill(x.lane, x.lane + 7, x.lane[7]);
    return x;
  }
  static double sum_before(const Doubles& scan, std::uint32_t chosen) {
    return chosen > 0 ? scan.lane[chosen - 1] : 0.0;
  }
  static std::uint32_t above(const Doubles& x, double bound) {
    std::uint32_t mask = 0;
    for (std::uint32_t k = 8; k-- > 0;) mask = 2 * mask + (x.lane[k] > bound ? 1U : 0U);
    return mask;
  }
  static std::uint32_t highest_key(const float* group) {
    std::uint32_t bits[kLeafGroup];
    std::memcpy(bits, group, sizeof bits);
    std::uint32_t high = 0;
    for (const std::uint32_t leaf : bits) high = std::max(high, 0U - leaf);
    return high;
  }
  static std::uint32_t highest(const std::uint32_t* keys) { return *std::max_element(keys, keys + kFanout); }
  static void stream(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
    std::memcpy(to, from, bytes);
    if (also_to != nullptr) std::memcpy(also_to, from, bytes);
  }
  static void fence() {}
};

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable = kernels_of<VecPortable>("portable");

}  // namespace rlv2v

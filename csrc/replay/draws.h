// Uniform draws by address: draw k of a seed is a function of (seed, k), so the state of the generator is a count.
//
//   key = splitmix64(seed + g);  bits_k = splitmix64(key + (k + 1) g);  u_k = floor(bits_k / 2^11) / 2^53;  g: kGolden
// Source: SplitMix64, Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195.
// Functions are static: each instruction set compiles its own, and code of one set must not be linked into another.
#pragma once

#include <cstdint>

namespace rlv2v {

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;

static inline std::uint64_t splitmix64(std::uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

static inline std::uint64_t draws_key(std::uint64_t seed) noexcept { return splitmix64(seed + kGolden); }

// Returns draw k in [0, 1), on a grid of 2^-53.
static inline double uniform_draw(std::uint64_t key, std::uint64_t k) noexcept {
  return static_cast<double>(splitmix64(key + (k + 1) * kGolden) >> 11) * 0x1.0p-53;
}

}  // namespace rlv2v

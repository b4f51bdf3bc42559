// XXH64 with seed 0, for files: a wrong bit is seen, at the speed of memory.
// Source: Collet, xxHash specification 0.1.1, "XXH64 algorithm description".
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rlv2v {

inline std::uint64_t checksum(const std::uint8_t* data, std::size_t bytes) noexcept {
  constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
  constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
  constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9ULL;
  constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
  constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;
  const auto rotate = [](std::uint64_t x, int by) { return (x << by) | (x >> (64 - by)); };
  const auto word = [](const std::uint8_t* at) {
    std::uint64_t value = 0;
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  const auto round = [&](std::uint64_t lane, std::uint64_t input) { return rotate(lane + input * kPrime2, 31) * kPrime1; };

  const std::uint8_t* at = data;
  const std::uint8_t* end = data + bytes;
  std::uint64_t hash = kPrime5;
  if (bytes >= 32) {
    std::uint64_t lanes[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    for (; end - at >= 32; at += 32) {
      for (int k = 0; k < 4; ++k) lanes[k] = round(lanes[k], word(at + 8 * k));
    }
    hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (const std::uint64_t lane : lanes) hash = (hash ^ round(0, lane)) * kPrime1 + kPrime4;
  }
  hash += bytes;
  for (; end - at >= 8; at += 8) hash = rotate(hash ^ round(0, word(at)), 27) * kPrime1 + kPrime4;
  if (end - at >= 4) {
    std::uint32_t half = 0;
    std::memcpy(&half, at, sizeof half);
    hash = rotate(hash ^ (half * kPrime1), 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) hash = rotate(hash ^ (*at * kPrime5), 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace rlv2v

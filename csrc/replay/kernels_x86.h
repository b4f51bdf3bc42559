// Shared by the AVX2 and AVX-512 sources; see kernels_body.h.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

template <class V>
struct VecX86 {
  static std::uint32_t highest_of(__m256i keys) {
    __m128i high = _mm_max_epu32(_mm256_castsi256_si128(keys), _mm256_extracti128_si256(keys, 1));
    high = _mm_max_epu32(high, _mm_shuffle_epi32(high, 0x4e));
    high = _mm_max_epu32(high, _mm_shuffle_epi32(high, 0xb1));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(high));
  }
  static std::uint32_t highest(const std::uint32_t* keys) {
    return highest_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys)));
  }
  static std::uint32_t highest_key(const float* group) {
    const auto keys = [](const float* from) {
      return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_castps_si256(_mm256_load_ps(from)));
    };
    return highest_of(_mm256_max_epu32(keys(group), keys(group + 8)));
  }
  // Prefetches two pages ahead, past the frame's end too, where a clip's next frame is: the CPU's own prefetch ends
  // with a page. The distance was measured.
  static void stream(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
    constexpr std::size_t kAhead = 8192;
    const auto copy = [=](auto two) {
      for (std::size_t offset = 0; offset < bytes; offset += sizeof(typename V::Bytes)) {
        if (offset % 64 == 0) __builtin_prefetch(from + offset + kAhead);
        const auto value = V::load_bytes(from + offset);
        V::stream_bytes(to + offset, value);
        if constexpr (two) V::stream_bytes(also_to + offset, value);
      }
    };
    also_to != nullptr ? copy(std::true_type()) : copy(std::false_type());
  }
  static void fence() { _mm_sfence(); }
};

}  // namespace
}  // namespace rlv2v

// Compiled with -mavx2.
#include <immintrin.h>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

void descend(const Node* nodes, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const double* sums = nodes[node[k]].prefix;
    const __m256d first = _mm256_loadu_pd(sums);
    const __m256d second = _mm256_loadu_pd(sums + 4);
    const __m256d at = _mm256_set1_pd(point[k]);
    const __m256d total = _mm256_set1_pd(sums[kFanout - 1]);
    const auto counted = [](__m256d low, __m256d high) {
      return static_cast<std::uint32_t>(__builtin_popcount(
          static_cast<unsigned>(_mm256_movemask_pd(low)) | static_cast<unsigned>(_mm256_movemask_pd(high)) << 4U));
    };
    const std::uint32_t passed = counted(_mm256_cmp_pd(first, at, _CMP_LE_OQ), _mm256_cmp_pd(second, at, _CMP_LE_OQ));
    const std::uint32_t positive = counted(_mm256_cmp_pd(first, total, _CMP_LT_OQ), _mm256_cmp_pd(second, total, _CMP_LT_OQ));
    const std::uint32_t chosen = passed < positive ? passed : positive;
    point[k] -= chosen > 0 ? sums[chosen - 1] : 0.0;
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + chosen;
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

void stream(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
  }
  _mm_sfence();
}

void stream_two(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 32) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), value);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(also_to + at), value);
  }
  _mm_sfence();
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2{"avx2", power<4>, weigh<4>, descend, stream, stream_two};

}  // namespace rlv2v

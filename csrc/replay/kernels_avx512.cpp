// Compiled with -mavx512f -mavx512dq -mpopcnt.
#include <immintrin.h>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

void descend(const Node* nodes, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const double* line = nodes[node[k]].prefix;
    const __m512d sums = _mm512_loadu_pd(line);
    const auto counted = [](__mmask8 mask) { return static_cast<std::uint32_t>(__builtin_popcount(mask)); };
    const std::uint32_t passed = counted(_mm512_cmp_pd_mask(sums, _mm512_set1_pd(point[k]), _CMP_LE_OQ));
    const std::uint32_t positive = counted(_mm512_cmp_pd_mask(sums, _mm512_set1_pd(line[kFanout - 1]), _CMP_LT_OQ));
    const std::uint32_t chosen = passed < positive ? passed : positive;
    point[k] -= chosen > 0 ? line[chosen - 1] : 0.0;
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + chosen;
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

void stream(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  _mm_sfence();
}

void stream_two(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) {
    const __m512i value = _mm512_loadu_si512(from + at);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), value);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(also_to + at), value);
  }
  _mm_sfence();
}

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512{"avx512", power<8>, weigh<8>, descend, stream, stream_two};

}  // namespace rlv2v

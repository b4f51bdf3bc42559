// Compiled with -mavx512f -mavx512dq -mbmi -mlzcnt: every CPU with the first two has the others.
#include <immintrin.h>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

constexpr std::size_t kAhead = 8192;  // bytes; measured, see docs/decisions.md

// Lane k of the result is lane k - By of x, 0 where there is none.
template <int By>
inline __m512d raised(__m512d x) {
  return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(x), _mm512_setzero_si512(), 8 - By));
}

inline __m512d scan8(__m512d p) {
  p = _mm512_add_pd(p, raised<1>(p));
  p = _mm512_add_pd(p, raised<2>(p));
  return _mm512_add_pd(p, raised<4>(p));
}

// The lanes of a group of leaves in f64, first and last eight.
struct Leaves {
  explicit Leaves(__m512 group)
      : first(_mm512_cvtps_pd(_mm512_castps512_ps256(group))), last(_mm512_cvtps_pd(_mm512_extractf32x8_ps(group, 1))) {}
  __m512d first, last;
};

// The last lane of the scan, by the same additions; all lanes of the result hold it.
inline __m512d total8(__m512d x) {
  x = _mm512_add_pd(x, _mm512_permute_pd(x, 0x55));
  x = _mm512_add_pd(x, _mm512_permutex_pd(x, 0x4e));
  return _mm512_add_pd(x, _mm512_shuffle_f64x2(x, x, 0x4e));
}

inline std::uint32_t highest8(__m256i x) {
  __m128i high = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  high = _mm_max_epu32(high, _mm_shuffle_epi32(high, 0x4e));
  high = _mm_max_epu32(high, _mm_shuffle_epi32(high, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(high));
}

// The lowest bit of past, or else the highest of positive, as a mask of one bit.
inline std::uint32_t chosen_bit(std::uint32_t past, std::uint32_t positive) {
  const std::uint32_t last = 0x80000000U >> _lzcnt_u32(positive);
  return past != 0 ? _blsi_u32(past) : last;
}

void descend(const double* sums, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const __m512d of_node = _mm512_load_pd(sums + std::size_t{node[k]} * kFanout);
    const __m512d scan = scan8(of_node);
    const __mmask8 positive = _mm512_cmp_pd_mask(of_node, _mm512_setzero_pd(), _CMP_GT_OQ);
    const __mmask8 past = _mm512_mask_cmp_pd_mask(positive, scan, _mm512_set1_pd(point[k]), _CMP_GT_OQ);
    const std::uint32_t bit = chosen_bit(past, positive);
    point[k] -= _mm512_cvtsd_f64(_mm512_maskz_compress_pd(static_cast<__mmask8>(bit), raised<1>(scan)));
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + _tzcnt_u32(bit);
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

void pick(const float* leaves, const double* point, std::uint32_t* index, float* value, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{index[k]} * kLeafGroup;
    const __m512 all = _mm512_load_ps(group);
    const Leaves parts(all);
    const __m512d first = scan8(parts.first);
    const __m512d last = _mm512_add_pd(scan8(parts.last), _mm512_permutexvar_pd(_mm512_set1_epi64(7), first));
    const __m512d at = _mm512_set1_pd(point[k]);
    const std::uint32_t positive = _mm512_cmp_ps_mask(all, _mm512_setzero_ps(), _CMP_GT_OQ);
    const std::uint32_t past = _mm512_cmp_pd_mask(first, at, _CMP_GT_OQ) |
                               static_cast<std::uint32_t>(_mm512_cmp_pd_mask(last, at, _CMP_GT_OQ)) << 8U;
    const std::uint32_t chosen = _tzcnt_u32(chosen_bit(past & positive, positive));
    index[k] = index[k] * static_cast<std::uint32_t>(kLeafGroup) + chosen;
    value[k] = group[chosen];
  }
}

void sum_leaves(const float* leaves, const std::uint32_t* groups, std::size_t count, double* sums, std::uint32_t* highs) {
  for (std::size_t k = 0; k < count; ++k) {
    const __m512 all = _mm512_load_ps(leaves + std::size_t{groups[k]} * kLeafGroup);
    const Leaves parts(all);
    const __m512i high = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_castps_si512(all));
    sums[groups[k]] = _mm512_cvtsd_f64(_mm512_add_pd(total8(parts.last), total8(parts.first)));
    highs[groups[k]] = highest8(_mm256_max_epu32(_mm512_castsi512_si256(high), _mm512_extracti32x8_epi32(high, 1)));
  }
}

void sum_nodes(const double* sums_below, const std::uint32_t* highs_below, const std::uint32_t* nodes, std::size_t count,
               double* sums, std::uint32_t* highs) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t first = std::size_t{nodes[k]} * kFanout;
    sums[nodes[k]] = _mm512_cvtsd_f64(total8(_mm512_load_pd(sums_below + first)));
    highs[nodes[k]] = highest8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(highs_below + first)));
  }
}

// Asks for what lies two pages on, past the frame's end too, where the next of a clip is: the CPU's own prefetch ends with a page.
void stream(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(from + at + kAhead);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  }
}

void stream_two(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(from + at + kAhead);
    const __m512i value = _mm512_loadu_si512(from + at);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), value);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(also_to + at), value);
  }
}

void fence() { _mm_sfence(); }

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512{"avx512", power<8>,  weigh<8>, uniform,    descend, pick,
                      sum_leaves, sum_nodes, stream,   stream_two, fence};

}  // namespace rlv2v

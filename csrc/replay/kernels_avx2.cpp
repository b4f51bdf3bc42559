// Compiled with -mavx2.
#include <immintrin.h>

#include "replay/kernels_body.h"

namespace rlv2v {
namespace {

constexpr std::size_t kAhead = 8192;  // bytes; measured, see docs/decisions.md

// Eight f64, lanes 0-3 and 4-7.
struct Eight {
  __m256d low, high;
};

inline Eight loaded(const double* from) { return {_mm256_load_pd(from), _mm256_load_pd(from + 4)}; }
inline Eight loaded(const float* from) {
  return {_mm256_cvtps_pd(_mm_load_ps(from)), _mm256_cvtps_pd(_mm_load_ps(from + 4))};
}
inline Eight operator+(Eight a, Eight b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }

// Lane k of the result is lane k - 1 (or 2) of x, 0 where there is none.
inline Eight raised2(Eight x) { return {_mm256_permute2f128_pd(x.low, x.low, 0x08), _mm256_permute2f128_pd(x.low, x.high, 0x21)}; }
inline Eight raised1(Eight x) {
  const Eight by2 = raised2(x);
  return {_mm256_shuffle_pd(by2.low, x.low, 0x5), _mm256_shuffle_pd(by2.high, x.high, 0x5)};
}

inline Eight scan8(Eight p) {
  p = p + raised1(p);
  p = p + raised2(p);
  return {p.low, _mm256_add_pd(p.high, p.low)};
}

// The last lane of the scan, by the same additions.
inline double total8(Eight x) {
  const auto of4 = [](__m256d lanes) {
    const __m256d pairs = _mm256_add_pd(lanes, _mm256_permute_pd(lanes, 0x5));
    return _mm_add_sd(_mm256_extractf128_pd(pairs, 1), _mm256_castpd256_pd128(pairs));
  };
  return _mm_cvtsd_f64(_mm_add_sd(of4(x.high), of4(x.low)));
}

inline std::uint32_t highest8(__m256i x) {
  __m128i high = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  high = _mm_max_epu32(high, _mm_shuffle_epi32(high, 0x4e));
  high = _mm_max_epu32(high, _mm_shuffle_epi32(high, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(high));
}

inline std::uint32_t above(Eight x, __m256d bound) {
  return static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(x.low, bound, _CMP_GT_OQ))) |
         static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(x.high, bound, _CMP_GT_OQ))) << 4U;
}

// The lowest bit of past, or else the highest of positive, as its number.
inline std::uint32_t chosen_of(std::uint32_t past, std::uint32_t positive) {
  return static_cast<std::uint32_t>(past != 0 ? __builtin_ctz(past) : 31 - __builtin_clz(positive));
}

void descend(const double* sums, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const Eight of_node = loaded(sums + std::size_t{node[k]} * kFanout);
    const Eight scan = scan8(of_node);
    const std::uint32_t positive = above(of_node, _mm256_setzero_pd());
    const std::uint32_t chosen = chosen_of(above(scan, _mm256_set1_pd(point[k])) & positive, positive);
    alignas(32) double before[9];
    before[0] = 0.0;
    _mm256_storeu_pd(before + 1, scan.low);
    _mm256_storeu_pd(before + 5, scan.high);
    point[k] -= before[chosen];
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + chosen;
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

void pick(const float* leaves, const double* point, std::uint32_t* index, float* value, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{index[k]} * kLeafGroup;
    const Eight first = loaded(group);
    const Eight last = loaded(group + 8);
    const std::uint32_t positive = above(first, _mm256_setzero_pd()) | above(last, _mm256_setzero_pd()) << 8U;
    const Eight first_scan = scan8(first);
    const __m256d total = _mm256_permute4x64_pd(first_scan.high, 0xff);
    const __m256d at = _mm256_set1_pd(point[k]);
    const std::uint32_t past = above(first_scan, at) | above(scan8(last) + Eight{total, total}, at) << 8U;
    const std::uint32_t chosen = chosen_of(past & positive, positive);
    index[k] = index[k] * static_cast<std::uint32_t>(kLeafGroup) + chosen;
    value[k] = group[chosen];
  }
}

void sum_leaves(const float* leaves, const std::uint32_t* groups, std::size_t count, double* sums, std::uint32_t* highs) {
  const auto negated = [](const float* from) {
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_castps_si256(_mm256_load_ps(from)));
  };
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{groups[k]} * kLeafGroup;
    sums[groups[k]] = total8(loaded(group + 8)) + total8(loaded(group));
    highs[groups[k]] = highest8(_mm256_max_epu32(negated(group), negated(group + 8)));
  }
}

void sum_nodes(const double* sums_below, const std::uint32_t* highs_below, const std::uint32_t* nodes, std::size_t count,
               double* sums, std::uint32_t* highs) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t first = std::size_t{nodes[k]} * kFanout;
    sums[nodes[k]] = total8(loaded(sums_below + first));
    highs[nodes[k]] = highest8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(highs_below + first)));
  }
}

// Asks for what lies two pages on, past the frame's end too, where the next of a clip is: the CPU's own prefetch ends with a page.
void stream(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 32) {
    if (at % 64 == 0) __builtin_prefetch(from + at + kAhead);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
  }
}

void stream_two(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 32) {
    if (at % 64 == 0) __builtin_prefetch(from + at + kAhead);
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), value);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(also_to + at), value);
  }
}

void fence() { _mm_sfence(); }

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2{"avx2",     power<4>,  weigh<4>, uniform,    descend, pick,
                    sum_leaves, sum_nodes, stream,   stream_two, fence};

}  // namespace rlv2v

// Compiled with -mavx2.
#include "replay/kernels_x86.h"

namespace rlv2v {
namespace {

struct Vec256 : VecX86<Vec256> {
  static constexpr std::size_t kWidth = 4;
  struct Doubles {
    __m256d low, high;  // lanes 0-3 and 4-7
  };
  using Bytes = __m256i;

  static Doubles load(const double* from) { return {_mm256_load_pd(from), _mm256_load_pd(from + 4)}; }
  static Doubles load(const float* from) {
    return {_mm256_cvtps_pd(_mm_load_ps(from)), _mm256_cvtps_pd(_mm_load_ps(from + 4))};
  }
  static Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
  // Lane k of the result is lane k - 1 (or 2) of x, 0 where there is none.
  static Doubles shift2(Doubles x) {
    return {_mm256_permute2f128_pd(x.low, x.low, 0x08), _mm256_permute2f128_pd(x.low, x.high, 0x21)};
  }
  static Doubles shift1(Doubles x) {
    const Doubles by2 = shift2(x);
    return {_mm256_shuffle_pd(by2.low, x.low, 0x5), _mm256_shuffle_pd(by2.high, x.high, 0x5)};
  }
  static Doubles scan(Doubles p) {
    p = add(p, shift1(p));
    p = add(p, shift2(p));
    return {p.low, _mm256_add_pd(p.high, p.low)};
  }
  // The last lane of the scan, by the same additions.
  static double total(Doubles x) {
    const auto of4 = [](__m256d lanes) {
      const __m256d pairs = _mm256_add_pd(lanes, _mm256_permute_pd(lanes, 0x5));
      return _mm_add_sd(_mm256_extractf128_pd(pairs, 1), _mm256_castpd256_pd128(pairs));
    };
    return _mm_cvtsd_f64(_mm_add_sd(of4(x.high), of4(x.low)));
  }
  static Doubles broadcast_last(Doubles x) {
    const __m256d last = _mm256_permute4x64_pd(x.high, 0xff);
    return {last, last};
  }
  static double sum_before(Doubles scan, std::uint32_t chosen) {
    double sums[9];
    sums[0] = 0.0;
    _mm256_storeu_pd(sums + 1, scan.low);
    _mm256_storeu_pd(sums + 5, scan.high);
    return sums[chosen];
  }
  static std::uint32_t above(Doubles x, double bound) {
    const __m256d all = _mm256_set1_pd(bound);
    return static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(x.low, all, _CMP_GT_OQ))) |
           static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(x.high, all, _CMP_GT_OQ))) << 4U;
  }
  static Bytes load_bytes(const std::uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const Bytes*>(from)); }
  static void stream_bytes(std::uint8_t* to, Bytes value) { _mm256_stream_si256(reinterpret_cast<Bytes*>(to), value); }
};

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = kernels_of<Vec256>("avx2");

}  // namespace rlv2v

// Compiled with -mavx512f -mavx512dq -mbmi -mlzcnt: every CPU with the first two has the others.
#include "replay/kernels_x86.h"

namespace rlv2v {
namespace {

struct Vec512 : VecX86<Vec512> {
  static constexpr std::size_t kWidth = 8;
  using Doubles = __m512d;
  using Bytes = __m512i;

  static Doubles load(const double* from) { return _mm512_load_pd(from); }
  static Doubles load(const float* from) { return _mm512_cvtps_pd(_mm256_load_ps(from)); }
  static Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
  // Lane k of the result is lane k - By of x, 0 where there is none.
  template <int By>
  static Doubles shift(Doubles x) {
    return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(x), _mm512_setzero_si512(), 8 - By));
  }
  static Doubles scan(Doubles p) {
    p = add(p, shift<1>(p));
    p = add(p, shift<2>(p));
    return add(p, shift<4>(p));
  }
  // The last lane of the scan, by the same additions.
  static double total(Doubles x) {
    x = add(x, _mm512_permute_pd(x, 0x55));
    x = add(x, _mm512_permutex_pd(x, 0x4e));
    return _mm512_cvtsd_f64(add(x, _mm512_shuffle_f64x2(x, x, 0x4e)));
  }
  static Doubles broadcast_last(Doubles x) { return _mm512_permutexvar_pd(_mm512_set1_epi64(7), x); }
  static double sum_before(Doubles scan, std::uint32_t chosen) {
    return _mm512_cvtsd_f64(_mm512_maskz_compress_pd(static_cast<__mmask8>(1U << chosen), shift<1>(scan)));
  }
  static std::uint32_t above(Doubles x, double bound) {
    return _mm512_cmp_pd_mask(x, _mm512_set1_pd(bound), _CMP_GT_OQ);
  }
  static Bytes load_bytes(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
  static void stream_bytes(std::uint8_t* to, Bytes value) { _mm512_stream_si512(reinterpret_cast<Bytes*>(to), value); }
};

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = kernels_of<Vec512>("avx512");

}  // namespace rlv2v

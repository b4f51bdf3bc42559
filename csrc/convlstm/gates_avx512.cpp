// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl, and once more by gates_avx512_bf16.cpp with -mavx512bf16,
// by which rounding to bf16 is one instruction.
#include <immintrin.h>

#include "convlstm/gates_body.h"

namespace rlv2v {
namespace {

struct Vec512 {
  using Real = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr bool kPacksRows = true;

  struct AllLanes {};
  struct SomeLanes {
    explicit SomeLanes(std::size_t count) : mask(static_cast<__mmask16>((1U << count) - 1U)) {}
    __mmask16 mask;
  };

  struct PackedRows;

  static Real set(float value) { return _mm512_set1_ps(value); }
  static Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
  static Real fnmadd(Real a, Real b, Real c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  // Splits x scale into n + f, at most `max`; for -inf, s and f are 0. Of two operands min returns the second if one is
  // NaN.
  static Exp2Parts<Real> exp2_parts(Real x, float scale, float max) {
    const Real y = _mm512_min_ps(set(max), x * set(scale));
    const Real f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return {_mm512_scalef_ps(set(1.0F), y - f), f};
  }
  // A 14-bit estimate and one step of Newton's, whose last rounding is then all but the only error.
  static Real reciprocal(Real x) {
    const Real rough = _mm512_rcp14_ps(x);
    return fma(rough, fnmadd(x, rough, set(1.0F)), rough);
  }
  static Real quotient(Real a, Real b) {
    const Real rough = _mm512_rcp14_ps(b);
    const Real near = a * rough;
    return fma(rough, fnmadd(near, b, a), near);
  }

  static Real load(const float* from, AllLanes) { return _mm512_loadu_ps(from); }
  static Real load(const float* from, SomeLanes lanes) { return _mm512_maskz_loadu_ps(lanes.mask, from); }
  template <class T, class Lanes>
  static Real load(const T* from, Lanes lanes) {
    return wide(bits(from, lanes), T{});
  }

  static void store(float* to, Real x, AllLanes) { _mm512_storeu_ps(to, x); }
  static void store(float* to, Real x, SomeLanes lanes) { _mm512_mask_storeu_ps(to, lanes.mask, x); }
  template <class T>
  static void store(T* to, Real x, AllLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x, T{}));
  }
  template <class T>
  static void store(T* to, Real x, SomeLanes lanes) {
    _mm256_mask_storeu_epi16(to, lanes.mask, narrow(x, T{}));
  }

 private:
  static __m256i bits(const void* from, AllLanes) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static __m256i bits(const void* from, SomeLanes lanes) { return _mm256_maskz_loadu_epi16(lanes.mask, from); }
  static Real wide(__m256i x, Half) { return _mm512_cvtph_ps(x); }
  static Real wide(__m256i x, Bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static __m256i narrow(Real x, Half) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#ifdef __AVX512BF16__
  static __m256i narrow(Real x, Bf16) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
  static __m256i narrow(Real x, Bf16) {
    const __m512i from = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(from, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(from, odd), _mm512_set1_epi32(0x7fff));
    // Rounding could carry a NaN over into another number.
    rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
#endif
};

// Packs several rows of at most 8 elements into one vector. Their gates fill up to four vectors in memory: lane k of
// gate n is element from[n][k] of those, and element k of vector v of those is lane to[v][k] of all gates in a row.
struct Vec512::PackedRows {
  explicit PackedRows(std::size_t row_length) : lanes(0), length(row_length) {
    alignas(64) std::int32_t all_from[4][kWidth] = {};
    alignas(64) std::int32_t all_to[4 * kWidth] = {};
    std::int32_t next = 0;
    for (std::size_t first = 0; first + length <= kWidth; first += length) {
      for (std::size_t gate = 0; gate < 4; ++gate) {
        for (std::size_t k = first; k < first + length; ++k, ++next) {
          all_from[gate][k] = next;
          all_to[next] = static_cast<std::int32_t>(gate * kWidth + k);
        }
      }
    }
    for (std::size_t k = 0; k < 4; ++k) {
      from[k] = Permutation(all_from[k]);
      to[k] = Permutation(all_to + k * kWidth);
    }
    set_count(kWidth / length);
  }

  void set_count(std::size_t rows) {
    lanes = SomeLanes(rows * length);
    for (std::size_t k = 0; k < 4; ++k) {
      const std::size_t left = 4 * rows * length > k * kWidth ? 4 * rows * length - k * kWidth : 0;
      parts[k] = SomeLanes(left < kWidth ? left : kWidth);
    }
  }

  template <class T>
  GateValues<Vec512> load(const T* gates) const {
    const Real all[4] = {Vec512::load(gates, parts[0]), Vec512::load(gates + kWidth, parts[1]),
                         Vec512::load(gates + 2 * kWidth, parts[2]), Vec512::load(gates + 3 * kWidth, parts[3])};
    return {from[0].apply(all), from[1].apply(all), from[2].apply(all), from[3].apply(all)};
  }
  template <class T>
  void store(T* gates, const GateValues<Vec512>& x) const {
    const Real all[4] = {x.i, x.f, x.o, x.g};
    for (std::size_t k = 0; k < 4; ++k) Vec512::store(gates + k * kWidth, to[k].apply(all), parts[k]);
  }

  // Selects 16 of the 64 elements of four vectors.
  struct Permutation {
    Permutation() : index(_mm512_setzero_si512()), last_half(0) {}
    explicit Permutation(const std::int32_t* numbers)
        : index(_mm512_load_si512(numbers)), last_half(_mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(2 * kWidth))) {}
    Real apply(const Real* all) const {
      return _mm512_mask_blend_ps(last_half, _mm512_permutex2var_ps(all[0], index, all[1]),
                                  _mm512_permutex2var_ps(all[2], index, all[3]));
    }
    __m512i index;  // the instruction reads five bits of each
    __mmask16 last_half;
  };

  SomeLanes lanes;
  std::size_t length;
  SomeLanes parts[4] = {SomeLanes(0), SomeLanes(0), SomeLanes(0), SomeLanes(0)};
  Permutation from[4];
  Permutation to[4];
};

}  // namespace

#ifdef __AVX512BF16__
extern const GatesKernels kGatesAvx512Bf16;
const GatesKernels kGatesAvx512Bf16 = kernels_of<Vec512>("avx512_bf16");
#else
extern const GatesKernels kGatesAvx512;
const GatesKernels kGatesAvx512 = kernels_of<Vec512>("avx512");
#endif

}  // namespace rlv2v

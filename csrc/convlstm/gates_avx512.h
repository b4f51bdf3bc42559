// Included by gates_avx512.cpp and gates_avx512_bf16.cpp, which differ in their flags: with the second's, rounding to
// bf16 is one instruction. Both have -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#pragma once

#include <immintrin.h>

#include "convlstm/gates_body.h"

namespace rlv2v {
namespace {

struct Vec512 {
  using Real = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr bool kPacksRows = true;

  struct All {};
  struct Some {
    explicit Some(std::size_t count) : mask(static_cast<__mmask16>((1U << count) - 1U)) {}
    __mmask16 mask;
  };

  struct Rows;

  static Real set(float value) { return _mm512_set1_ps(value); }
  static Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
  static Real less_product(Real c, Real a, Real b) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  // x scale as n + f, at most `most`; down to -inf, for which s is 0 and f too. Of two operands min gives back the
  // second when one is NaN.
  static Power<Real> power(Real x, float scale, float most) {
    const Real y = _mm512_min_ps(set(most), x * set(scale));
    const Real f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return {_mm512_scalef_ps(set(1.0F), y - f), f};
  }
  // A 14-bit estimate and one step of Newton's, whose last rounding is then all but the only error.
  static Real inverse(Real x) {
    const Real rough = _mm512_rcp14_ps(x);
    return fma(rough, less_product(set(1.0F), x, rough), rough);
  }
  static Real quotient(Real a, Real b) {
    const Real rough = _mm512_rcp14_ps(b);
    const Real near = a * rough;
    return fma(rough, less_product(a, near, b), near);
  }

  static Real load(const float* from, All) { return _mm512_loadu_ps(from); }
  static Real load(const float* from, Some lanes) { return _mm512_maskz_loadu_ps(lanes.mask, from); }
  template <class T, class Lanes>
  static Real load(const T* from, Lanes lanes) {
    return wide(bits(from, lanes), T{});
  }

  static void store(float* to, Real x, All) { _mm512_storeu_ps(to, x); }
  static void store(float* to, Real x, Some lanes) { _mm512_mask_storeu_ps(to, lanes.mask, x); }
  template <class T>
  static void store(T* to, Real x, All) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x, T{}));
  }
  template <class T>
  static void store(T* to, Real x, Some lanes) {
    _mm256_mask_storeu_epi16(to, lanes.mask, narrow(x, T{}));
  }

 private:
  static __m256i bits(const void* from, All) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static __m256i bits(const void* from, Some lanes) { return _mm256_maskz_loadu_epi16(lanes.mask, from); }
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

// Several rows of at most 8 elements in one vector. Their gates lie together too, in up to four vectors: element e of
// gate n is number from[n] of those, and number k of those is element to[k], counted on from gate to gate.
struct Vec512::Rows {
  explicit Rows(std::size_t row_length) : lanes(0), length(row_length) {
    alignas(64) std::int32_t all_from[4][kWidth] = {};
    alignas(64) std::int32_t all_to[4 * kWidth] = {};
    std::int32_t at = 0;
    for (std::size_t first = 0; first + length <= kWidth; first += length) {
      for (std::size_t gate = 0; gate < 4; ++gate) {
        for (std::size_t k = first; k < first + length; ++k, ++at) {
          all_from[gate][k] = at;
          all_to[at] = static_cast<std::int32_t>(gate * kWidth + k);
        }
      }
    }
    for (std::size_t k = 0; k < 4; ++k) {
      from[k] = Choice(all_from[k]);
      to[k] = Choice(all_to + k * kWidth);
    }
    set_count(kWidth / length);
  }

  void set_count(std::size_t rows) {
    lanes = Some(rows * length);
    for (std::size_t k = 0; k < 4; ++k) {
      const std::size_t left = 4 * rows * length > k * kWidth ? 4 * rows * length - k * kWidth : 0;
      parts[k] = Some(left < kWidth ? left : kWidth);
    }
  }

  template <class T>
  Four<Vec512> load(const T* at) const {
    const Real all[4] = {Vec512::load(at, parts[0]), Vec512::load(at + kWidth, parts[1]),
                         Vec512::load(at + 2 * kWidth, parts[2]), Vec512::load(at + 3 * kWidth, parts[3])};
    return {from[0].of(all), from[1].of(all), from[2].of(all), from[3].of(all)};
  }
  template <class T>
  void store(T* at, const Four<Vec512>& x) const {
    const Real all[4] = {x.i, x.f, x.o, x.g};
    for (std::size_t k = 0; k < 4; ++k) Vec512::store(at + k * kWidth, to[k].of(all), parts[k]);
  }

  // Sixteen of the 64 elements of four vectors.
  struct Choice {
    Choice() : index(_mm512_setzero_si512()), last_half(0) {}
    explicit Choice(const std::int32_t* numbers)
        : index(_mm512_load_si512(numbers)), last_half(_mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(2 * kWidth))) {}
    Real of(const Real* all) const {
      return _mm512_mask_blend_ps(last_half, _mm512_permutex2var_ps(all[0], index, all[1]),
                                  _mm512_permutex2var_ps(all[2], index, all[3]));
    }
    __m512i index;  // of which the instruction sees five bits
    __mmask16 last_half;
  };

  Some lanes;
  std::size_t length;
  Some parts[4] = {Some(0), Some(0), Some(0), Some(0)};
  Choice from[4];
  Choice to[4];
};

}  // namespace
}  // namespace rlv2v

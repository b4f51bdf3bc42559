// Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include <cstring>

#include "convlstm/gates_body.h"

namespace rlv2v {
namespace {

struct Vec256 {
  using Real = __m256;
  static constexpr std::size_t kWidth = 8;
  static constexpr bool kPacksRows = false;

  struct AllLanes {};
  struct SomeLanes {
    explicit SomeLanes(std::size_t n)
        : count(n),
          mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
    std::size_t count;
    __m256i mask;
  };

  static Real set(float value) { return _mm256_set1_ps(value); }
  static Real fma(Real a, Real b, Real c) { return _mm256_fmadd_ps(a, b, c); }
  static Real fnmadd(Real a, Real b, Real c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
  // Splits x scale into n + f, clamped to +-max. Of two operands min and max return the second if one is NaN. Adding
  // magic rounds to n and leaves n + 127 in the low bits.
  static Exp2Parts<Real> exp2_parts(Real x, float scale, float max) {
    const Real magic = set(0x1.8p+23F + 127.0F);
    const float bound = max / (scale < 0.0F ? -scale : scale);
    const Real y = _mm256_min_ps(set(bound), _mm256_max_ps(set(-bound), x));
    const Real shifted = fma(y, set(scale), magic);
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return {_mm256_castsi256_ps(exponent), fma(y, set(scale), magic - shifted)};
  }
  static Real reciprocal(Real x) { return set(1.0F) / x; }
  static Real quotient(Real a, Real b) { return a / b; }

  static Real load(const float* from, AllLanes) { return _mm256_loadu_ps(from); }
  static Real load(const float* from, const SomeLanes& lanes) { return _mm256_maskload_ps(from, lanes.mask); }
  template <class T, class Lanes>
  static Real load(const T* from, const Lanes& lanes) {
    return wide(bits(from, lanes), T{});
  }

  static void store(float* to, Real x, AllLanes) { _mm256_storeu_ps(to, x); }
  // A masked store is slow on Zen 4: with it rows of 3 took 10 ns an element backward, without it 4.
  static void store(float* to, Real x, const SomeLanes& lanes) {
    __m128 left = _mm256_castps256_ps128(x);
    if ((lanes.count & 4U) != 0) {
      _mm_storeu_ps(to, left);
      left = _mm256_extractf128_ps(x, 1);
    }
    float* rest = to + (lanes.count & 4U);
    if ((lanes.count & 2U) != 0) {
      _mm_storel_pi(reinterpret_cast<__m64*>(rest), left);
      left = _mm_movehl_ps(left, left);
    }
    if ((lanes.count & 1U) != 0) _mm_store_ss(rest + (lanes.count & 2U), left);
  }
  template <class T>
  static void store(T* to, Real x, AllLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(x, T{}));
  }
  template <class T>
  static void store(T* to, Real x, const SomeLanes& lanes) {
    const __m128i all = narrow(x, T{});
    const auto low = static_cast<std::uint64_t>(_mm_cvtsi128_si64(all));
    if (lanes.count < 4) return store_few(to, low, lanes.count);
    std::memcpy(to, &low, sizeof low);
    store_few(to + 4, static_cast<std::uint64_t>(_mm_extract_epi64(all, 1)), lanes.count - 4);
  }

 private:
  // Loads up to three 16-bit numbers by way of a register: reading a vector from where parts of it were just written
  // would stall.
  static std::uint64_t load_few(const std::uint16_t* from, std::size_t count) {
    std::uint64_t few = 0;
    for (std::size_t k = count; k-- > 0;) few = few << 16U | from[k];
    return few;
  }
  template <class T>
  static void store_few(T* to, std::uint64_t few, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) to[k].bits = static_cast<std::uint16_t>(few >> 16U * k);
  }
  static __m128i bits(const void* from, AllLanes) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  template <class T>
  static __m128i bits(const T* from, const SomeLanes& lanes) {
    const std::uint16_t* numbers = &from->bits;
    std::uint64_t low = 0;
    if (lanes.count < 4) return _mm_cvtsi64_si128(static_cast<long long>(load_few(numbers, lanes.count)));
    std::memcpy(&low, numbers, sizeof low);
    const std::uint64_t high = load_few(numbers + 4, lanes.count - 4);
    return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
  }
  static Real wide(__m128i x, Half) { return _mm256_cvtph_ps(x); }
  static Real wide(__m128i x, Bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static __m128i narrow(Real x, Half) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m128i narrow(Real x, Bf16) {
    const __m256i from = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(from, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(from, odd), _mm256_set1_epi32(0x7fff));
    // Rounding could carry a NaN over into another number.
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
};

}  // namespace

extern const GatesKernels kGatesAvx2;
const GatesKernels kGatesAvx2 = kernels_of<Vec256>("avx2");

}  // namespace rlv2v

// A vector of f32 as wide as the registers of the instruction set that the compiler's flags ask for, and its way from
// and to memory in each type. Written with the vector types of GCC and Clang; intrinsics stand where they were faster.
// Everything is in an unnamed namespace: code of one set must not be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace rlv2v {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kWidth = 16;
#elif defined(__AVX2__)
constexpr std::size_t kWidth = 8;
#else
constexpr std::size_t kWidth = 4;
#endif

typedef float Real __attribute__((vector_size(kWidth * sizeof(float))));
typedef std::uint32_t Bits __attribute__((vector_size(kWidth * sizeof(std::uint32_t))));
typedef std::uint16_t Bits16 __attribute__((vector_size(kWidth * sizeof(std::uint16_t))));

enum class Bf16 : std::uint16_t {};
enum class Half : std::uint16_t {};

struct AllLanes {};

inline Real set(float value) { return Real{} + value; }

// Each set brings: a / b; a clamp to +-bound in which NaN stays NaN; conversions of halves, and of integers, which
// compilers make of slower instructions; loads and stores of the first lanes alone, which load 0 into the others.
#if defined(__AVX512F__)

// A 14-bit estimate and one step of Newton's, whose last rounding is then all but the only error.
inline Real quotient(Real a, Real b) {
  const Real rough = _mm512_rcp14_ps(b);
  const Real near = a * rough;
  return rough * (a - near * b) + near;
}
inline Bits widen(Bits16 x) { return (Bits)_mm512_cvtepu16_epi32((__m256i)x); }
inline Bits16 narrow(Bits x) { return (Bits16)_mm512_cvtepi32_epi16((__m512i)x); }
inline Real widen(Bits16 x, Half) { return _mm512_cvtph_ps((__m256i)x); }
inline Bits16 narrow(Real x, Half) { return (Bits16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

struct SomeLanes {
  explicit SomeLanes(std::size_t count) : mask(static_cast<__mmask16>((1U << count) - 1U)) {}
  __mmask16 mask;
};
inline void load_some(const float* from, SomeLanes lanes, Real& x) { x = _mm512_maskz_loadu_ps(lanes.mask, from); }
inline void load_some(const void* from, SomeLanes lanes, Bits16& x) {
  x = (Bits16)_mm256_maskz_loadu_epi16(lanes.mask, from);
}
inline void store_some(float* to, SomeLanes lanes, Real x) { _mm512_mask_storeu_ps(to, lanes.mask, x); }
inline void store_some(void* to, SomeLanes lanes, Bits16 x) { _mm256_mask_storeu_epi16(to, lanes.mask, (__m256i)x); }

#elif defined(__AVX2__)

// Of two operands min and max return the second if one is NaN.
inline Real clamped(Real x, float bound) { return _mm256_min_ps(set(bound), _mm256_max_ps(set(-bound), x)); }
inline Real quotient(Real a, Real b) { return a / b; }
inline Bits widen(Bits16 x) { return (Bits)_mm256_cvtepu16_epi32((__m128i)x); }
inline Bits16 narrow(Bits x) {
  return (Bits16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
inline Real widen(Bits16 x, Half) { return _mm256_cvtph_ps((__m128i)x); }
inline Bits16 narrow(Real x, Half) { return (Bits16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

struct SomeLanes {
  explicit SomeLanes(std::size_t n)
      : count(n),
        mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
  std::size_t count;
  __m256i mask;
};
inline void load_some(const float* from, const SomeLanes& lanes, Real& x) { x = _mm256_maskload_ps(from, lanes.mask); }
// A masked store is slow on Zen 4: with it rows of 3 took 10 ns an element backward, without it 4.
inline void store_some(float* to, const SomeLanes& lanes, Real x) {
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
// Loads up to three 16-bit numbers by way of a register: reading a vector from where parts of it were just written
// would stall.
template <class T>
inline std::uint64_t load_few(const T* from, std::size_t count) {
  std::uint64_t few = 0;
  for (std::size_t k = count; k-- > 0;) few = few << 16U | static_cast<std::uint16_t>(from[k]);
  return few;
}
template <class T>
inline void store_few(T* to, std::uint64_t few, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) to[k] = static_cast<T>(few >> 16U * k);
}
template <class T>
inline void load_some(const T* from, const SomeLanes& lanes, Bits16& x) {
  if (lanes.count < 4) {
    x = (Bits16)_mm_cvtsi64_si128(static_cast<long long>(load_few(from, lanes.count)));
    return;
  }
  std::uint64_t low = 0;
  std::memcpy(&low, from, sizeof low);
  const std::uint64_t high = load_few(from + 4, lanes.count - 4);
  x = (Bits16)_mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}
template <class T>
inline void store_some(T* to, const SomeLanes& lanes, Bits16 x) {
  const auto low = static_cast<std::uint64_t>(_mm_cvtsi128_si64((__m128i)x));
  if (lanes.count < 4) return store_few(to, low, lanes.count);
  std::memcpy(to, &low, sizeof low);
  store_few(to + 4, static_cast<std::uint64_t>(_mm_extract_epi64((__m128i)x, 1)), lanes.count - 4);
}

#else

inline Real clamped(Real x, float bound) {
  const Real low = x < -bound ? set(-bound) : x;
  return low > bound ? set(bound) : low;
}
inline Real quotient(Real a, Real b) { return a / b; }
inline Bits widen(Bits16 x) { return __builtin_convertvector(x, Bits); }
inline Bits16 narrow(Bits x) { return __builtin_convertvector(x, Bits16); }
// The exponent moves by a multiplication, which makes subnormals normal.
inline Real widen(Bits16 x, Half) {
  const Bits bits = widen(x);
  const Bits size = (bits & 0x7fffU) << 13U;
  const Bits wide = size < 0x0f800000U ? (Bits)((Real)size * 0x1p112F) : size | 0x7f800000U;
  return (Real)(wide | (bits & 0x8000U) << 16U);
}
inline Bits16 narrow(Real x, Half) {
  const Bits size = (Bits)x & 0x7fffffffU;
  const Bits normal = (size - 0x38000000U + 0xfffU + ((size >> 13U) & 1U)) >> 13U;
  // Adding 0.5 to what becomes subnormal rounds to the unit of the last place, 2^-24.
  Bits half = size < 0x38800000U ? (Bits)((Real)size + 0.5F) - 0x3f000000U : normal;
  half = size >= 0x477ff000U ? Bits{} + 0x7c00U : half;  // 65520 and more
  half = size > 0x7f800000U ? Bits{} + 0x7e00U : half;
  return narrow(half | ((Bits)x & 0x80000000U) >> 16U);
}

struct SomeLanes {
  explicit SomeLanes(std::size_t n) : count(n) {}
  std::size_t count;
};
// Lane by lane through registers: reading a vector from where parts of it were just written would stall.
template <std::size_t K = 0, class T, class Vector>
inline void load_some(const T* from, SomeLanes lanes, Vector& x) {
  if (K == lanes.count) return;
  x[K] = static_cast<std::decay_t<decltype(x[0])>>(from[K]);
  if constexpr (K + 2 < kWidth) load_some<K + 1>(from, lanes, x);
}
template <std::size_t K = 0, class T, class Vector>
inline void store_some(T* to, SomeLanes lanes, Vector x) {
  if (K == lanes.count) return;
  to[K] = static_cast<T>(x[K]);
  if constexpr (K + 2 < kWidth) store_some<K + 1>(to, lanes, x);
}

#endif

inline Real widen(Real x, float) { return x; }
inline Real widen(Bits16 x, Bf16) { return (Real)(widen(x) << 16U); }
inline Real narrow(Real x, float) { return x; }
inline Bits16 narrow(Real x, Bf16) {
#ifdef __AVX512BF16__
  return (Bits16)_mm512_cvtneps_pbh(x);
#else
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U;
  return narrow(x != x ? Bits{} + 0x7fc0U : rounded);  // rounding could carry a NaN over into another number
#endif
}

// A vector as it lies in memory, by the type of its elements.
inline Real in_memory(float) { return Real{}; }
template <class T>
Bits16 in_memory(T) {
  return Bits16{};
}

template <class T>
inline Real load(const T* from, AllLanes) {
  auto x = in_memory(T{});
  std::memcpy(&x, from, sizeof x);
  return widen(x, T{});
}
template <class T>
inline Real load(const T* from, const SomeLanes& lanes) {
  auto x = in_memory(T{});
  load_some(from, lanes, x);
  return widen(x, T{});
}
template <class T>
inline void store(T* to, Real x, AllLanes) {
  const auto stored = narrow(x, T{});
  std::memcpy(to, &stored, sizeof stored);
}
template <class T>
inline void store(T* to, Real x, const SomeLanes& lanes) {
  store_some(to, lanes, narrow(x, T{}));
}

}  // namespace
}  // namespace rlv2v

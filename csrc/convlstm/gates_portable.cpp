#include <cstring>

#include "convlstm/gates_body.h"

namespace rlv2v {
namespace {

std::uint32_t bits_of(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_from_bits(std::uint32_t bits) {
  float x = 0.0F;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float widen(float x) { return x; }
float widen(Bf16 x) { return float_from_bits(static_cast<std::uint32_t>(x.bits) << 16U); }
// The exponent moves by a multiplication, which makes subnormals normal.
float widen(Half x) {
  const std::uint32_t sign = (x.bits & 0x8000U) << 16U;
  const std::uint32_t size = (x.bits & 0x7fffU) << 13U;
  const std::uint32_t bits = size < 0x0f800000U ? bits_of(float_from_bits(size) * 0x1p112F) : size | 0x7f800000U;
  return float_from_bits(bits | sign);
}

void narrow(float x, float* to) { *to = x; }
void narrow(float x, Bf16* to) {
  const std::uint32_t bits = bits_of(x);
  to->bits = static_cast<std::uint16_t>(x != x ? 0x7fc0U : (bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U);
}
void narrow(float x, Half* to) {
  const std::uint32_t sign = (bits_of(x) & 0x80000000U) >> 16U;
  const std::uint32_t size = bits_of(x) & 0x7fffffffU;
  std::uint32_t half = 0;
  if (size > 0x7f800000U) {
    half = 0x7e00U;
  } else if (size >= 0x477ff000U) {  // 65520 and more
    half = 0x7c00U;
  } else if (size < 0x38800000U) {  // subnormal: adding 0.5 rounds to the unit of the last place, 2^-24
    half = bits_of(float_from_bits(size) + 0.5F) - 0x3f000000U;
  } else {
    half = (size - 0x38000000U + 0xfffU + ((size >> 13U) & 1U)) >> 13U;
  }
  to->bits = static_cast<std::uint16_t>(half | sign);
}

struct VecPortable {
  static constexpr std::size_t kWidth = 4;
  static constexpr bool kPacksRows = false;
  typedef float Real __attribute__((vector_size(kWidth * sizeof(float))));
  typedef std::uint32_t Bits __attribute__((vector_size(kWidth * sizeof(float))));

  struct AllLanes {
    static constexpr std::size_t count = kWidth;
  };
  struct SomeLanes {
    explicit SomeLanes(std::size_t n) : count(n) {}
    std::size_t count;
  };

  static Real set(float value) { return Real{} + value; }
  static Real fma(Real a, Real b, Real c) { return a * b + c; }
  static Real fnmadd(Real a, Real b, Real c) { return c - a * b; }
  // Splits x scale into n + f, clamped to +-max. Adding magic rounds to n and leaves n + 127 in the low bits.
  static Exp2Parts<Real> exp2_parts(Real x, float scale, float max) {
    constexpr float kMagic = 0x1.8p+23F + 127.0F;
    Real y = x * scale;
    y = y < -max ? set(-max) : y;
    y = y > max ? set(max) : y;
    const Real shifted = y + kMagic;
    return {(Real)((Bits)shifted << 23U), y - (shifted - kMagic)};
  }
  static Real reciprocal(Real x) { return 1.0F / x; }
  static Real quotient(Real a, Real b) { return a / b; }

  template <class T, class Lanes>
  static Real load(const T* from, Lanes lanes) {
    float all[kWidth] = {};
    for (std::size_t k = 0; k < lanes.count; ++k) all[k] = widen(from[k]);
    Real x;
    std::memcpy(&x, all, sizeof x);
    return x;
  }
  template <class T, class Lanes>
  static void store(T* to, Real x, Lanes lanes) {
    float all[kWidth];
    std::memcpy(all, &x, sizeof x);
    for (std::size_t k = 0; k < lanes.count; ++k) narrow(all[k], to + k);
  }
};

}  // namespace

extern const GatesKernels kGatesPortable;
const GatesKernels kGatesPortable = kernels_of<VecPortable>("portable");

}  // namespace rlv2v

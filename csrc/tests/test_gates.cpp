// Tests every instruction set of this CPU against the formulas in f64, on the same quantised inputs. Limits follow from
// the type: kMaths for sigmoid and tanh, a few roundings of f32, and one rounding to the stored type.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "convlstm/gates.h"
#include "formats.h"
#include "isa.h"

namespace {

using rlv2v::GatesBackward;
using rlv2v::GatesForward;
using rlv2v::FloatType;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kMaths = 3e-7;
constexpr double kF32 = 0x1p-24;
constexpr FloatType kTypes[] = {FloatType::kF32, FloatType::kBf16, FloatType::kF16};

Format format_of(FloatType type) {
  return type == FloatType::kF32 ? kSingle : type == FloatType::kBf16 ? kBfloat16 : kFloat16;
}
Format stored_as(FloatType type) { return type == FloatType::kF32 ? kSingle : kFloat16; }

double sigmoid(double x) { return x >= 0.0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x)); }

bool near(double got, double expected, double limit) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::fabs(got - expected) <= limit;
}

struct Shape {
  std::size_t rows, length;
  std::size_t size() const { return rows * length; }
  // Returns the index of gate n of element k.
  std::size_t gate(std::size_t k, std::size_t n) const { return k / length * 4 * length + n * length + k % length; }
};

struct Forward {
  Forward(FloatType of, Shape is, std::uint64_t seed)
      : type(of), shape(is), a(format_of(of), 4 * is.size()), a_h(a), c_prev(kSingle, is.size()),
        h(format_of(of), is.size()), c(c_prev), gates(stored_as(of), 4 * is.size()) {
    a.fill(seed, -6.0, 6.0);
    a_h.fill(seed + 1, -3.0, 3.0);
    c_prev.fill(seed + 2, -2.0, 2.0);
  }

  GatesForward step(unsigned present = 7U, int num_threads = 1) {
    return {type, static_cast<std::int64_t>(shape.rows), static_cast<std::int64_t>(shape.length), a.data(),
            (present & 1U) != 0 ? a_h.data() : nullptr, (present & 2U) != 0 ? c_prev.data<float>() : nullptr, h.data(),
            c.data<float>(), (present & 4U) != 0 ? gates.data() : nullptr, num_threads};
  }

  double activated(std::size_t k, std::size_t n, unsigned present) const {
    const std::size_t index = shape.gate(k, n);
    const float added = static_cast<float>(a[index]) + ((present & 1U) != 0 ? static_cast<float>(a_h[index]) : 0.0F);
    return n == 3 ? std::tanh(static_cast<double>(added)) : sigmoid(static_cast<double>(added));
  }

  void run_and_check(unsigned present) {
    rlv2v::gates_forward(step(present));
    for (std::size_t k = 0; k < shape.size(); ++k) {
      double x[4];
      for (std::size_t n = 0; n < 4; ++n) {
        x[n] = activated(k, n, present);
        CHECK((present & 4U) == 0 || near(gates[shape.gate(k, n)], x[n], kMaths + gates.format().rounding(x[n])));
        CHECK((present & 4U) == 0 || !(std::fabs(gates[shape.gate(k, n)]) > 1.0));
      }
      const double c_before = (present & 2U) != 0 ? c_prev[k] : 0.0;
      const double expected = x[0] * x[3] + ((present & 2U) != 0 ? x[1] * c_before : 0.0);
      const double limit = kMaths * (2.0 + std::fabs(c_before)) + 2.0 * kF32 * std::fabs(expected);
      CHECK(near(c[k], expected, limit));
      const double spread = std::tanh(expected + limit) - std::tanh(expected - limit);
      const double h_expected = x[2] * std::tanh(expected);
      CHECK(near(h[k], h_expected, spread + 2.0 * kMaths + h.format().rounding(h_expected)));
    }
  }

  FloatType type;
  Shape shape;
  Array a, a_h, c_prev, h, c, gates;
};

struct Backward {
  Backward(FloatType of, Shape is, bool is_activated, std::uint64_t seed)
      : type(of), shape(is), activated(is_activated), dh1(format_of(of), is.size()), dh2(dh1),
        dc_out(kSingle, is.size()), carry(dc_out), gates(is_activated ? stored_as(of) : format_of(of), 4 * is.size()),
        c(dc_out), c_prev(dc_out), da(format_of(of), 4 * is.size()), carry_out(dc_out) {
    dh1.fill(seed, -1.0, 1.0);
    dh2.fill(seed + 1, -1.0, 1.0);
    dc_out.fill(seed + 2, -1.0, 1.0);
    carry.fill(seed + 3, -1.0, 1.0);
    c.fill(seed + 4, -2.0, 2.0);
    c_prev.fill(seed + 5, -2.0, 2.0);
    gates.fill(seed + 6, activated ? 0.0 : -6.0, activated ? 1.0 : 6.0);
    for (std::size_t k = 0; k < shape.size() && activated; k += 2) {
      gates.set(shape.gate(k, 3), -gates[shape.gate(k, 3)]);
    }
  }

  GatesBackward step(unsigned present = 63U, int num_threads = 1) {
    const auto floats = [present](unsigned bit, Array& array) {
      return (present & bit) != 0 ? array.data<float>() : nullptr;
    };
    return {type, activated, static_cast<std::int64_t>(shape.rows), static_cast<std::int64_t>(shape.length),
            floats(1, dh1), floats(2, dh2), floats(4, dc_out), floats(8, carry), gates.data(), c.data<float>(),
            floats(16, c_prev), da.data(), floats(32, carry_out), num_threads};
  }

  void run_and_check(unsigned present) {
    rlv2v::gates_backward(step(present));
    const double gate_error = activated ? 0.0 : kMaths;
    for (std::size_t k = 0; k < shape.size(); ++k) {
      double x[4];
      for (std::size_t n = 0; n < 4; ++n) {
        x[n] = gates[shape.gate(k, n)];
        if (!activated) x[n] = n == 3 ? std::tanh(x[n]) : sigmoid(x[n]);
      }
      const auto or_zero = [present, k](unsigned bit, const Array& array) {
        return (present & bit) != 0 ? array[k] : 0.0;
      };
      const double dh = or_zero(1, dh1) + or_zero(2, dh2);
      const double tc = std::tanh(c[k]);
      const double dc = or_zero(4, dc_out) + or_zero(8, carry) + dh * x[2] * (1.0 - tc * tc);
      const double c_before = or_zero(16, c_prev);
      // Sums of absolute values, which roundings are relative to.
      const double dh_size = std::fabs(or_zero(1, dh1)) + std::fabs(or_zero(2, dh2));
      const double dc_size = std::fabs(or_zero(4, dc_out)) + std::fabs(or_zero(8, carry)) + dh_size;
      const double f_size = dc_size * std::fabs(c_before);
      const double expected[] = {dc * x[3] * x[0] * (1.0 - x[0]),
                                 (present & 16U) != 0 ? dc * c_before * x[1] * (1.0 - x[1]) : 0.0,
                                 dh * tc * x[2] * (1.0 - x[2]), dc * x[0] * (1.0 - x[3] * x[3])};
      const double size[] = {dc_size, f_size, dh_size, dc_size};
      for (std::size_t n = 0; n < 4; ++n) {
        const double limit = (2.0 * kMaths + 3.0 * gate_error + 6.0 * kF32) * size[n];
        CHECK(near(da[shape.gate(k, n)], expected[n], limit + da.format().rounding(expected[n])));
      }
      const double carry_limit = (2.0 * kMaths + 2.0 * gate_error + 6.0 * kF32) * dc_size;
      CHECK((present & 32U) == 0 || near(carry_out[k], dc * x[1], carry_limit));
    }
  }

  FloatType type;
  Shape shape;
  bool activated;
  Array dh1, dh2, dc_out, carry, gates, c, c_prev, da, carry_out;
};

void shapes_and_nulls() {
  std::vector<std::size_t> lengths{64, 100, 1000};
  for (std::size_t length = 1; length <= 40; ++length) lengths.push_back(length);
  unsigned present = 0;
  for (const FloatType type : kTypes) {
    for (const std::size_t length : lengths) {
      for (std::size_t rows = 1; rows <= 5; ++rows, present += 5) {
        Forward(type, {rows, length}, present).run_and_check(present % 8U);
        Backward(type, {rows, length}, present % 2U == 0, present).run_and_check(present % 64U);
      }
    }
    for (const std::size_t length : {std::size_t{3}, std::size_t{19}}) {
      for (unsigned some = 0; some < 8; ++some) Forward(type, {7, length}, some).run_and_check(some);
      for (unsigned some = 0; some < 128; ++some) {
        Backward(type, {7, length}, some >= 64, some).run_and_check(some % 64U);
      }
    }
  }
}

// Each extreme for each gate and for c in turn, the rest ordinary; then all the same.
void extremes() {
  const std::vector<double> values{0.0,   -0.0, 1e-8, -1e-8, 88.0,  -88.0,     104.0,     -104.0,
                                   1e4,   -1e4, 3e38, -3e38, kInfinity, -kInfinity, kNan};
  for (const FloatType type : kTypes) {
    const Shape shape{6, values.size()};
    Forward forward(type, shape, 1);
    Backward backward(type, shape, false, 2);
    Backward from_c(type, shape, true, 3);
    for (std::size_t k = 0; k < values.size(); ++k) {
      for (std::size_t n = 0; n < 4; ++n) {
        for (const std::size_t row : {n, std::size_t{5}}) {
          forward.a.set(shape.gate(row * values.size() + k, n), values[k]);
          backward.gates.set(shape.gate(row * values.size() + k, n), values[k]);
        }
      }
      if (!std::isinf(values[k])) forward.c_prev.set(4 * values.size() + k, values[k]);
      from_c.c.set(2 * values.size() + k, values[k]);
    }
    for (const unsigned present : {6U, 4U, 7U}) forward.run_and_check(present);
    for (const std::size_t k : {std::size_t{12}, std::size_t{10}}) {  // inf and 3e38, each followed by its negative
      rlv2v::gates_forward(forward.step(6U));
      CHECK(forward.gates[shape.gate(k, 0)] == 1.0 && forward.gates[shape.gate(k + 1 + values.size(), 1)] < 1e-37);
      CHECK(forward.gates[shape.gate(k + 3 * values.size(), 3)] == 1.0);
      CHECK(forward.gates[shape.gate(k + 1 + 3 * values.size(), 3)] == -1.0);
    }
    backward.run_and_check(63U);
    from_c.run_and_check(63U);
  }
}

// Tests f32 sigmoid and tanh over their full range; tanh relative to its own size, with the sign of its argument.
void maths() {
  constexpr std::size_t kCount = 20000;
  Forward forward(FloatType::kF32, {1, kCount}, 4);
  const Draws draws(5);
  for (std::size_t k = 0; k < kCount; ++k) {
    const double x = std::exp2(draws.uniform(k) * 50.0 - 42.0) * (k % 2 == 0 ? 1.0 : -1.0);
    const double even = std::copysign(12.0 * draws.uniform(k), x);
    for (std::size_t n = 0; n < 4; ++n) forward.a.set(forward.shape.gate(k, n), k % 4 < 2 ? x : even);
  }
  rlv2v::gates_forward(forward.step(4U));
  for (std::size_t k = 0; k < kCount; ++k) {
    const double exact = std::tanh(forward.a[forward.shape.gate(k, 3)]);
    CHECK(near(forward.gates[forward.shape.gate(k, 0)], sigmoid(forward.a[forward.shape.gate(k, 0)]), kMaths));
    CHECK(near(forward.gates[forward.shape.gate(k, 3)], exact, std::min(kMaths, 5e-7 * std::fabs(exact))));
  }
}

// Stored numbers are rounded half to even, and every 16-bit number is read exactly. With i = f = 1, g = o = 0 and no
// dh, da_g = carry = dc_out; with o = 1 and c = 0 it is dh.
void conversions() {
  constexpr std::size_t kCount = 65536;
  for (const FloatType type : {FloatType::kBf16, FloatType::kF16}) {
    Backward one(type, {1, kCount}, true, 0);
    const Draws draws(6);
    for (std::size_t k = 0; k < kCount; ++k) {
      auto bits = static_cast<std::uint32_t>(draws.uniform(k) * 0x1p32);
      if (k % 4 == 1) bits = (bits & 0xffff0000U) | 0x8000U;                                       // ties
      if (k % 4 == 2) bits = (bits & 0x8fffe000U) | 0x30001000U;                                   // of halves
      if (k % 4 == 3) bits = kSingle.encode(std::ldexp(bits, static_cast<int>(k / 4 % 60) - 64));
      one.dc_out.set_bits(k, bits);
      for (std::size_t n = 0; n < 4; ++n) one.gates.set(one.shape.gate(k, n), n < 2 ? 1.0 : 0.0);
      one.dh1.set_bits(k, static_cast<std::uint32_t>(k));
      one.c.set(k, 0.0);
    }
    rlv2v::gates_backward(one.step(4U));
    for (std::size_t k = 0; k < kCount; ++k) {
      const double exact = one.dc_out[k];
      const std::uint32_t got = one.da.bits(one.shape.gate(k, 3));
      const Format format = one.da.format();
      const bool flushed = type == FloatType::kBf16 && std::fabs(exact) < format.min_normal() && (got & 0x7fffU) == 0;
      CHECK(std::isnan(exact) ? std::isnan(format.decode(got)) : flushed || got == format.encode(exact));
    }
    for (std::size_t k = 0; k < kCount; ++k) one.gates.set(one.shape.gate(k, 2), 1.0);
    rlv2v::gates_backward(one.step(1U | 32U));
    for (std::size_t k = 0; k < kCount; ++k) CHECK(near(one.carry_out[k], one.dh1[k], 0.0));
    for (std::size_t k = 0; k < kCount; ++k) {
      one.gates.set_bits(one.shape.gate(k, 1), static_cast<std::uint32_t>(k));
      one.dc_out.set(k, 1.0);
    }
    rlv2v::gates_backward(one.step(4U | 32U));
    for (std::size_t k = 0; k < kCount; ++k) CHECK(near(one.carry_out[k], one.gates[one.shape.gate(k, 1)], 0.0));
  }
}

// The same bits in place, and on any number of threads.
void in_place_and_threads() {
  for (const FloatType type : kTypes) {
    for (const Shape shape : {Shape{5, 3}, Shape{4, 21}, Shape{3, 22001}, Shape{2100, 32}, Shape{23000, 3}}) {
      Forward apart(type, shape, 7);
      Forward inside(apart);
      rlv2v::gates_forward(apart.step());
      GatesForward step = inside.step(7U, 3);
      step.gates = inside.a.data();
      step.c = inside.c_prev.data<float>();
      rlv2v::gates_forward(step);
      bool same = inside.h == apart.h && inside.c_prev == apart.c;
      for (std::size_t k = 0; k < apart.gates.size(); ++k) same = same && inside.a.bits(k) == apart.gates.bits(k);
      CHECK(same);
      for (const bool activated : {true, false}) {
        Backward back(type, shape, activated, 8);
        Backward over(back);
        rlv2v::gates_backward(back.step());
        GatesBackward other = over.step(63U, 2);
        other.da = over.gates.data();
        other.carry_out = over.carry.data<float>();
        rlv2v::gates_backward(other);
        same = over.carry == back.carry_out;
        for (std::size_t k = 0; k < back.da.size(); ++k) same = same && over.gates.bits(k) == back.da.bits(k);
        CHECK(same);
      }
    }
  }
}

template <class Step>
bool refused(void (*run)(const Step&), Step step, void (*spoil)(Step&)) {
  spoil(step);
  return throws<std::invalid_argument>([&] { run(step); });
}

void refusals() {
  Forward forward(FloatType::kF32, {2, 3}, 9);
  Backward backward(FloatType::kF32, {2, 3}, true, 9);
  using Step = GatesForward;
  using Back = GatesBackward;
  void (*const bad_steps[])(Step&) = {
      [](Step& step) { step.a = nullptr; }, [](Step& step) { step.h = nullptr; },
      [](Step& step) { step.c = nullptr; }, [](Step& step) { step.type = static_cast<FloatType>(3); },
      [](Step& step) { step.rows = -1; },   [](Step& step) { step.rows = step.length = std::int64_t{1} << 31; },
      [](Step& step) { step.num_threads = 0; }};
  for (const auto spoil : bad_steps) CHECK(refused(&rlv2v::gates_forward, forward.step(), spoil));
  void (*const bad_backs[])(Back&) = {[](Back& step) { step.gates = nullptr; }, [](Back& step) { step.c = nullptr; },
                                      [](Back& step) { step.da = nullptr; }, [](Back& step) { step.length = -1; }};
  for (const auto spoil : bad_backs) CHECK(refused(&rlv2v::gates_backward, backward.step(), spoil));
  CHECK(throws<std::invalid_argument>([] { rlv2v::choose_isa("none"); }));
  rlv2v::gates_forward({FloatType::kF32, 0, 5, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1});
}

}  // namespace

int main() {
  for (const rlv2v::Isa set : rlv2v::available_isas()) {
    rlv2v::choose_isa(rlv2v::isa_name(set));
    CHECK(rlv2v::isa() == set);
    shapes_and_nulls();
    extremes();
    maths();
    conversions();
    in_place_and_threads();
  }
  refusals();
  return 0;
}

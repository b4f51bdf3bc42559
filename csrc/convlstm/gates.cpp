#include "convlstm/gates.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace rlv2v {

extern const GatesKernels kGatesPortable;
#ifdef RLV2V_X86
extern const GatesKernels kGatesAvx2;
extern const GatesKernels kGatesAvx512;
extern const GatesKernels kGatesAvx512Bf16;
#endif

namespace {

constexpr std::size_t kMinPerThread = 32768;  // elements of a state, some 50 us of work; chosen, not measured
constexpr const GatesKernels* kKernels[kNumIsas] = {
    &kGatesPortable,
#ifdef RLV2V_X86
    &kGatesAvx2,
    &kGatesAvx512,
    &kGatesAvx512Bf16,
#endif
};

const GatesKernels& kernels() { return *kKernels[static_cast<std::size_t>(isa())]; }

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("gates: " + name + " must be " + expected + ", got " + got);
}

template <class Step>
void check_sizes(const Step& step) {
  const int type = static_cast<int>(step.type);
  if (type < 0 || type > 2) refuse("dtype", "0 (f32), 1 (bf16) or 2 (f16)", std::to_string(type));
  if (step.rows < 0) refuse("rows", ">= 0", std::to_string(step.rows));
  if (step.length < 0) refuse("length", ">= 0", std::to_string(step.length));
  constexpr std::int64_t kMaxElements = std::numeric_limits<std::int64_t>::max() / 16;  // 4 gates of 4 bytes
  if (step.length > 0 && step.rows > kMaxElements / step.length) {
    refuse("rows * length", "at most " + std::to_string(kMaxElements),
           std::to_string(step.rows) + " * " + std::to_string(step.length));
  }
  if (step.num_threads < 1) refuse("num_threads", ">= 1", std::to_string(step.num_threads));
}

void require(const void* address, const char* name) {
  if (address == nullptr) refuse(name, "an address", "null");
}

// Runs a kernel on all rows: each thread takes complete rows if there are enough, else a part of every row.
template <class Step>
void split(void (*kernel)(const Step&, const GatesBlock&), const Step& step) {
  const auto rows = static_cast<std::size_t>(step.rows);
  const auto length = static_cast<std::size_t>(step.length);
#ifdef _OPENMP
  const std::size_t threads = std::min(static_cast<std::size_t>(step.num_threads), rows * length * 2 / kMinPerThread);
  if (threads > 1 && rows * length > kMinPerThread) {
    const bool by_rows = rows >= 8 * threads;
    const std::size_t unit = by_rows ? 1 : 64;  // complete cache lines of every type, if the address is aligned
    const std::size_t units = by_rows ? rows : (length + unit - 1) / unit;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (std::size_t thread = 0; thread < threads; ++thread) {
      const std::size_t begin = units * thread / threads * unit;
      const std::size_t end = std::min(units * (thread + 1) / threads * unit, by_rows ? rows : length);
      kernel(step, by_rows ? GatesBlock{begin, end, 0, length} : GatesBlock{0, rows, begin, end});
    }
    return;
  }
#endif
  kernel(step, {0, rows, 0, length});
}

}  // namespace

void gates_forward(const GatesForward& step) {
  check_sizes(step);
  if (step.rows == 0 || step.length == 0) return;
  require(step.a, "a");
  require(step.h, "h");
  require(step.c, "c");
  split(kernels().forward[static_cast<int>(step.type)], step);
}

void gates_backward(const GatesBackward& step) {
  check_sizes(step);
  if (step.rows == 0 || step.length == 0) return;
  require(step.gates, "gates");
  require(step.c, "c");
  require(step.da, "da");
  split(kernels().backward[static_cast<int>(step.type)], step);
}

}  // namespace rlv2v

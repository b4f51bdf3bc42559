#include "isa.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rlv2v {

namespace {

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> set{available_isas().back()};
  return set;
}

}  // namespace

const char* isa_name(Isa set) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<std::size_t>(set)];
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> sets{Isa::kPortable};
#ifdef RLV2V_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      sets.push_back(Isa::kAvx2);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      sets.push_back(Isa::kAvx512);
      if (__builtin_cpu_supports("avx512bf16")) sets.push_back(Isa::kAvx512Bf16);
    }
#endif
    return sets;
  }();
  return all;
}

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void choose_isa(const char* name) {
  std::string names;
  for (const Isa set : available_isas()) {
    if (std::strcmp(isa_name(set), name) == 0) {
      chosen().store(set, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(isa_name(set));
  }
  throw std::invalid_argument("instruction set must be one of " + names + ", got " + name);
}

}  // namespace rlv2v

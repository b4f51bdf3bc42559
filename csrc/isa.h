// The instruction sets that the pointwise kernels are compiled for. Which one runs is chosen once for the process.
#pragma once

#include <cstddef>
#include <vector>

namespace rlv2v {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
#ifdef RLV2V_X86
constexpr std::size_t kNumIsas = 4;
#else
constexpr std::size_t kNumIsas = 1;
#endif

const char* isa_name(Isa isa);

// The sets that this CPU can run, the plainest first. The last is used until another is chosen by name; calls that are
// running end with the set they began with. choose_isa throws std::invalid_argument for a name that is not among them.
const std::vector<Isa>& available_isas();
Isa isa();
void choose_isa(const char* name);

}  // namespace rlv2v

#include "replay/kernels.h"

namespace rlv2v {

extern const Kernels kPortable;
#ifdef RLV2V_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> sets{&kPortable};
#ifdef RLV2V_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) sets.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) sets.push_back(&kAvx512);
#endif
    return sets;
  }();
  return all;
}

}  // namespace rlv2v

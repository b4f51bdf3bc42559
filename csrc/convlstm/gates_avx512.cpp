#include "convlstm/gates_avx512.h"

namespace rlv2v {

extern const GatesKernels kGatesAvx512;
const GatesKernels kGatesAvx512 = kernels_of<Vec512>("avx512");

}  // namespace rlv2v

// Compiled with the flags of gates_avx512.cpp and -mavx512bf16.
#include "convlstm/gates_avx512.h"

namespace rlv2v {

extern const GatesKernels kGatesAvx512Bf16;
const GatesKernels kGatesAvx512Bf16 = kernels_of<Vec512>("avx512_bf16");

}  // namespace rlv2v

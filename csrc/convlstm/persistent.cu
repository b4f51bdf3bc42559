// Launches the persistent kernels: picks the instance of the plan, raises the shared-memory limit, and starts one
// cooperative launch. All its CTAs are resident, so their barrier never waits for one that has not begun.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "convlstm/persistent_kernel.cuh"

namespace rlv2v {
namespace {

template <class D, int kSlice, class Pass>
__global__ void __launch_bounds__(kPersistentThreads, kMaxBlocksPerSm) run_kernel(const __grid_constant__ Pass pass) {
  run_pass<D, kSlice>(pass);
}

template <class D, class Pass>
const void* kernel_of(int slice) {
  return slice == 16 ? reinterpret_cast<const void*>(&run_kernel<D, 16, Pass>)
                     : reinterpret_cast<const void*>(&run_kernel<D, 8, Pass>);
}

void check(cudaError_t error, const std::string& action) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of any library would report it again
  throw std::runtime_error("persistent: " + action + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking device " + std::to_string(device) + " for its limits");
  return value;
}

}  // namespace

template <class Pass>
void run_persistent(const ConvLstmShape& shape, Half16 dtype, int device, Pass pass, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check(cudaSetDevice(device), "choosing device " + std::to_string(device));
  const DeviceLimits limits{attribute(cudaDevAttrMultiProcessorCount, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  PersistentPlan plan{};
  constexpr bool kBackward = std::is_same_v<Pass, PersistentBackward>;
  if (const std::string reason = plan_persistent(shape, kBackward, limits, plan); !reason.empty()) {
    throw std::invalid_argument("persistent: " + reason);
  }
  pass.geometry = persistent_geometry(shape, plan);
  const void* kernel = dtype == Half16::kFloat16 ? kernel_of<device::Half, Pass>(plan.slice)
                                                 : kernel_of<device::Bfloat, Pass>(plan.slice);
  const std::string action = "launching " + std::to_string(plan.blocks) + " CTAs with " +
                           std::to_string(plan.shared_bytes) + " bytes of shared memory each on device " +
                           std::to_string(device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes), action);
  // All of an SM's shared memory: the plan relies on it for the number of resident CTAs.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        action);
  const std::size_t counters = sizeof(std::uint32_t) * kCounterStride * static_cast<std::size_t>(shape.groups);
  check(cudaMemsetAsync(pass.counters, 0, counters, cuda_stream), action);
  void* arguments[] = {&pass};
  check(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(kPersistentThreads),
                                    arguments, static_cast<std::size_t>(plan.shared_bytes), cuda_stream),
        action);
}

template void run_persistent(const ConvLstmShape&, Half16, int, PersistentForward, void*);
template void run_persistent(const ConvLstmShape&, Half16, int, PersistentBackward, void*);

}  // namespace rlv2v

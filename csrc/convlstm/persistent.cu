// Launches the persistent kernels: picks the instance that the plan asks for, raises the shared-memory limit, starts it
// as one cooperative launch: all its CTAs are resident, so that their barrier waits for none that has not begun.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "convlstm/persistent_kernel.cuh"

namespace rlv2v {

namespace {

template <class D, int kSlice>
__global__ void __launch_bounds__(kPersistentThreads, kMostBlocksPerSm)
    forward_kernel(const __grid_constant__ PersistentForward pass) {
  forward_pass<D, kSlice>(pass);
}

template <class D, int kSlice>
__global__ void __launch_bounds__(kPersistentThreads, kMostBlocksPerSm)
    backward_kernel(const __grid_constant__ PersistentBackward pass) {
  backward_pass<D, kSlice>(pass);
}

using Kernel = const void*;

template <class D>
Kernel kernel_of(const PersistentForward&, int slice) {
  return slice == 16 ? reinterpret_cast<Kernel>(&forward_kernel<D, 16>)
                     : reinterpret_cast<Kernel>(&forward_kernel<D, 8>);
}
template <class D>
Kernel kernel_of(const PersistentBackward&, int slice) {
  return slice == 16 ? reinterpret_cast<Kernel>(&backward_kernel<D, 16>)
                     : reinterpret_cast<Kernel>(&backward_kernel<D, 8>);
}

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call, of whoever it is, would report it again
  throw std::runtime_error("persistent: " + what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking device " + std::to_string(device) + " for its limits");
  return value;
}

template <class Pass>
void run(const ConvLstmShape& shape, bool backward, Sixteen dtype, int device, Pass pass, cudaStream_t stream) {
  check(cudaSetDevice(device), "choosing device " + std::to_string(device));
  const DeviceLimits limits{attribute(cudaDevAttrMultiProcessorCount, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  PersistentPlan plan{};
  if (const std::string reason = plan_persistent(shape, backward, limits, plan); !reason.empty()) {
    throw std::invalid_argument("persistent: " + reason);
  }
  pass.geometry = persistent_geometry(shape, plan);
  const Kernel kernel =
      dtype == Sixteen::kHalf ? kernel_of<device::Half>(pass, plan.slice) : kernel_of<device::Bfloat>(pass, plan.slice);
  const std::string what = "launching " + std::to_string(plan.blocks) + " CTAs with " +
                           std::to_string(plan.shared_bytes) + " bytes of shared memory each on device " +
                           std::to_string(device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes), what);
  // All of an SM's shared memory: the plan counts on it for how many CTAs are resident.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        what);
  const std::size_t counters = sizeof(std::uint32_t) * kCounterStride * static_cast<std::size_t>(shape.groups);
  check(cudaMemsetAsync(pass.counters, 0, counters, stream), what);
  void* arguments[] = {&pass};
  check(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(kPersistentThreads),
                                    arguments, static_cast<std::size_t>(plan.shared_bytes), stream),
        what);
}

}  // namespace

void run_persistent(const ConvLstmShape& shape, Sixteen dtype, int device, PersistentForward pass, void* stream) {
  run(shape, false, dtype, device, pass, static_cast<cudaStream_t>(stream));
}

void run_persistent(const ConvLstmShape& shape, Sixteen dtype, int device, PersistentBackward pass, void* stream) {
  run(shape, true, dtype, device, pass, static_cast<cudaStream_t>(stream));
}

}  // namespace rlv2v

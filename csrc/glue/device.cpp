// SPDX-License-Identifier: MIT
#include "glue/device.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"

#if FASTCONV_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastconv {

namespace {

void on_torch_threads(int64_t count, int64_t grain, const void* context, cpu::RangeBody body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

const bool installed = (cpu::set_parallel_for(on_torch_threads), true);

Target cpu_target() { return {Device::cpu, static_cast<int>(cpu::isa())}; }

}  // namespace

#if FASTCONV_WITH_CUDA

Target target_of(c10::Device device) {
  if (!device.is_cuda()) return cpu_target();
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
  return {Device::cuda, 10 * major + minor};
}

Target default_target(Device device) {
  if (device == Device::cpu) return cpu_target();
  if (c10::cuda::device_count() > 0) return target_of(c10::Device(c10::kCUDA, c10::cuda::current_device()));
  return {Device::cuda, 90};
}

const char* why_no_cuda() { return nullptr; }

struct DeviceScope::Guard {
  explicit Guard(c10::Device on) : device(on), stream(c10::cuda::getCurrentCUDAStream(on.index()).stream()) {}

  c10::cuda::CUDAGuard device;
  void* stream;
};

DeviceScope::DeviceScope(c10::Device device) {
  if (device.is_cuda()) guard_ = std::make_unique<Guard>(device);
}

#else

Target target_of(c10::Device device) {
  return device.is_cuda() ? default_target(Device::cuda) : cpu_target();
}

Target default_target(Device device) {
  return device == Device::cpu ? cpu_target() : Target{Device::cuda, 90};
}

const char* why_no_cuda() { return FASTCONV_CUDA_REASON; }

struct DeviceScope::Guard {
  void* stream = nullptr;
};

DeviceScope::DeviceScope(c10::Device) {}

#endif

bool allows_tf32(Device device, Layer layer) {
  if (device == Device::cpu) return false;
  const at::Context& torch = at::globalContext();
  if (layer == Layer::conv) return torch.allowTF32CuDNN(at::Float32Op::CONV);
  // allowTF32CuBLAS() fails where older flags disagree with this one.
  return torch.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

DeviceScope::~DeviceScope() = default;

void* DeviceScope::stream() const { return guard_ ? guard_->stream : nullptr; }

}  // namespace fastconv

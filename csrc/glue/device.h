// SPDX-License-Identifier: MIT
// The device that a call runs on: what it can run, its current stream, why a build lacks it.
#pragma once

#include <memory>

#include <c10/core/Device.h>

#include "core/chain_args.h"

namespace fastconv {

Target target_of(c10::Device device);

// What `explain` assumes: this machine's processor; the GPU that is there, else sm_90.
Target default_target(Device device);

// Whether torch's flags, as they stand, let float32 be multiplied in TF32: those of cuDNN's convolutions, or,
// for linear layers, of cuBLAS's products.
bool allows_tf32(Device device, Layer layer);

// Why this build has no CUDA kernels, or null.
const char* why_no_cuda();

// Makes a device current while it lives, and knows its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(c10::Device device);
  ~DeviceScope();
  void* stream() const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

}  // namespace fastconv

// SPDX-License-Identifier: MIT
// Picks the row, takes its workspace from PyTorch's allocator, and launches it on the
// tensor's device and current stream.
#pragma once

#include <string>

#include <ATen/ops/empty.h>

#include "core/watch.h"
#include "glue/device.h"
#include "glue/tensor.h"

namespace fastconv {

template <class Args>
void launch(Table<Args> Tables::* table, const Row<Args>& row, const Args& args, int64_t bytes,
            const at::Tensor& like) {
  note_launch(tables(kernel_device(like)).*table, args, row);
  TORCH_CHECK(row.launch, row.name, " is not in this build: ", why_no_cuda());
  at::Tensor workspace;
  if (bytes > 0) workspace = at::empty({bytes}, like.options().dtype(at::kByte).memory_format(std::nullopt));
  const DeviceScope scope(like.device());
  row.launch(args, bytes > 0 ? workspace.data_ptr() : nullptr, scope.stream());
}

template <class Args>
void run(Table<Args> Tables::* table, const Args& args, const at::Tensor& like, c10::string_view kernel) {
  const Row<Args>& row = choose(tables(kernel_device(like)).*table, args, std::string(kernel).c_str());
  launch(table, row, args, row.workspace_bytes(args), like);
}

}  // namespace fastconv

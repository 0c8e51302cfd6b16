// SPDX-License-Identifier: MIT
#include "glue/tensor.h"

#include <ATen/ops/empty.h>

namespace fastconv {

void check_tensors(const char* op, std::initializer_list<Named> tensors) {
  const Named& first = *tensors.begin();
  const auto dtype = first.tensor.scalar_type();
  for (const Named& t : tensors) {
    TORCH_CHECK(t.tensor.scalar_type() == dtype, op, ": ", t.name, " must have the dtype of ", first.name,
                ", ", dtype, ", got ", t.tensor.scalar_type());
    TORCH_CHECK(t.tensor.device() == first.tensor.device(), op, ": ", t.name, " must be on the device of ",
                first.name, ", ", first.tensor.device(), ", got ", t.tensor.device());
    TORCH_CHECK(t.tensor.layout() == at::kStrided, op, ": ", t.name, " must be a dense tensor, got layout ",
                t.tensor.layout());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, op, ": ",
      first.name, " must be float32, float64, float16 or bfloat16, got ", dtype);
}

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kHalf:
      return Dtype::f16;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      return Dtype::f32;  // check_tensors has refused everything else
  }
}

Device kernel_device(const at::Tensor& tensor) { return tensor.is_cuda() ? Device::cuda : Device::cpu; }

View view_of(const at::Tensor& t) {
  View view{t.data_ptr(), t.stride(0), t.stride(1), 0, 0, 0};
  const int64_t rank = t.dim();
  view.w = t.stride(rank - 1);
  if (rank >= 4) view.h = t.stride(rank - 2);
  if (rank >= 5) view.d = t.stride(rank - 3);
  return view;
}

Matrix matrix_of(const at::Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

bool is_channels_last(const at::Tensor& tensor) {
  const auto format = tensor.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

Layout layout_of(std::initializer_list<at::Tensor> tensors) {
  bool contiguous = true, channels_last = true;
  for (const at::Tensor& t : tensors) {
    contiguous = contiguous && t.is_contiguous();
    channels_last =
        channels_last && t.dim() >= 4 &&
        t.is_contiguous(t.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
  }
  return contiguous ? Layout::contiguous : channels_last ? Layout::channels_last : Layout::strided;
}

Extent3 extent3(at::IntArrayRef spatial, int64_t missing) {
  Extent3 e{missing, missing, missing};
  e.w = spatial[spatial.size() - 1];
  if (spatial.size() >= 2) e.h = spatial[spatial.size() - 2];
  if (spatial.size() >= 3) e.d = spatial[spatial.size() - 3];
  return e;
}

Act act_of(c10::string_view act) {
  if (act == "relu") return Act::relu;
  FASTCONV_CHECK(act == "none", "act must be 'none' or 'relu', got '", std::string(act), "'");
  return Act::none;
}

namespace {

at::MemoryFormat memory_format(size_t rank, bool channels_last) {
  if (!channels_last || rank < 4) return at::MemoryFormat::Contiguous;
  return rank == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

}  // namespace

at::Tensor new_tensor(const at::Tensor& like, const Sizes<int64_t>& sizes, bool channels_last,
                      at::ScalarType dtype) {
  return at::empty(sizes,
                   like.options().dtype(dtype).memory_format(memory_format(sizes.size(), channels_last)));
}

at::Tensor new_tensor(const at::Tensor& like, const Sizes<c10::SymInt>& sizes, bool channels_last,
                      at::ScalarType dtype) {
  return at::empty_symint(
      sizes, like.options().dtype(dtype).memory_format(memory_format(sizes.size(), channels_last)));
}

}  // namespace fastconv

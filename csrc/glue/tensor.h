// SPDX-License-Identifier: MIT
// From tensors to the plain structs of core/args.h, and the checks that only a tensor can fail.
#pragma once

#include <initializer_list>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/SymInt.h>
#include <c10/util/string_view.h>

#include "core/args.h"
#include "core/shape.h"

namespace fastconv {

using OptionalTensor = std::optional<at::Tensor>;

// A tensor argument with its name, for messages.
struct Named {
  const char* name;
  const at::Tensor& tensor;
};

// Fails unless all lie on one device and share one dtype that the kernels take.
void check_tensors(const char* op, std::initializer_list<Named> tensors);

Dtype dtype_of(const at::Tensor& tensor);
Device kernel_device(const at::Tensor& tensor);

// Batched tensors [N, C, spatial...] with one to three spatial axes.
View view_of(const at::Tensor& tensor);
inline View view_of(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? view_of(*tensor) : View{};
}
Matrix matrix_of(const at::Tensor& tensor);

inline void* data_of(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? tensor->data_ptr() : nullptr;
}

// A bias is one dimension; kernels read it densely.
inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

bool is_channels_last(const at::Tensor& tensor);
Layout layout_of(std::initializer_list<at::Tensor> tensors);

// One to three spatial values; `missing` stands for the axes in front of them.
Extent3 extent3(at::IntArrayRef spatial, int64_t missing = 1);

// A new tensor of `sizes`, channels_last where asked for and possible.
at::Tensor new_tensor(const at::Tensor& like, const Sizes<int64_t>& sizes, bool channels_last,
                      at::ScalarType dtype);
at::Tensor new_tensor(const at::Tensor& like, const Sizes<c10::SymInt>& sizes, bool channels_last,
                      at::ScalarType dtype);

// Sizes of tensors and arguments, real or symbolic. A backend kernel is written once over both.
template <class Int>
Sizes<Int> sizes_of(const at::Tensor& tensor);
template <>
inline Sizes<int64_t> sizes_of<int64_t>(const at::Tensor& tensor) {
  return tensor.sizes().vec();
}
template <>
inline Sizes<c10::SymInt> sizes_of<c10::SymInt>(const at::Tensor& tensor) {
  return tensor.sym_sizes().vec();
}

template <class Int>
void check_size(const char* op, const Named& t, const Sizes<Int>& expected) {
  FASTCONV_CHECK(sizes_of<Int>(t.tensor) == expected, op, ": ", t.name, " must have size ", text(expected),
                 ", got ", text(sizes_of<Int>(t.tensor)));
}

Act act_of(c10::string_view act);

// How a window's offsets are stored (core/args.h: offset_type).
template <class Int>
at::ScalarType offset_dtype(const Sizes<Int>& kernel) {
  Int cells(1);
  for (const Int& k : kernel) cells = cells * k;
  return cells <= Int(255) ? at::kByte : at::kInt;
}

// Fails unless `offsets` are those of windows of `kernel` cells, on the device of `like`.
template <class Int>
void check_offsets(const char* op, const at::Tensor& offsets, const at::Tensor& like,
                   const Sizes<Int>& expected, const Sizes<Int>& kernel) {
  check_size(op, {"offsets", offsets}, expected);
  const at::ScalarType dtype = offset_dtype(kernel);
  TORCH_CHECK(
      offsets.scalar_type() == dtype && offsets.device() == like.device() && offsets.layout() == at::kStrided,
      op, ": offsets must be ", dtype, " on ", like.device(), ", got ", offsets.scalar_type(), " on ",
      offsets.device());
}

}  // namespace fastconv

// SPDX-License-Identifier: MIT
// The operators' schemas, their entry for eager Python, and introspection. csrc/glue implements them.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <ATen/core/grad_mode.h>

#include "cpu/isa.h"
#include "glue/device.h"
#include "glue/eager.h"
#include "glue/introspect.h"
#include "glue/operators.h"

namespace {

// Read out of the file by fastconv/_load.py before it is loaded.
__attribute__((used)) const char kBuiltWith[] = "fastconv-built-with-torch=" FASTCONV_BUILT_TORCH ";";

}  // namespace

// Shapes: input [N, C, spatial...], weight [K, C/groups, spatial...], one to three spatial
// axes. `padding` of a convolution lists the front of each axis, then the back. `kernel_name` has
// the rows to force, separated by commas; torch's inductor takes an argument `kernel` for its own.
TORCH_LIBRARY(fastconv, m) {
  // y = conv(input, weight) + bias
  m.def(
      "conv_fprop(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] "
      "dilation, "
      "SymInt groups, str kernel_name=\"\") -> Tensor");
  // gradient of the input
  m.def(
      "conv_dgrad(Tensor grad_output, Tensor weight, SymInt[] input_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str kernel_name=\"\") -> Tensor");
  // gradients of weight and bias; the latter empty unless asked for
  m.def(
      "conv_wgrad(Tensor grad_output, Tensor input, SymInt[] weight_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, bool bias, str kernel_name=\"\") -> (Tensor, Tensor)");
  // y = max_pool(act(conv(input, weight) + bias)), and where in each window the
  // maximum lay; no pool_kernel: no pool
  m.def(
      "conv_act_pool(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str act, SymInt[] pool_kernel, SymInt[] pool_stride, SymInt[] "
      "pool_padding, "
      "bool save_offsets, str kernel_name=\"\") -> (Tensor, Tensor)");
  // gradients of input, weight and bias, those that mask asks for
  m.def(
      "conv_act_pool_backward(Tensor grad_output, Tensor output, Tensor offsets, Tensor input, Tensor "
      "weight, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str act, SymInt[] pool_kernel, "
      "SymInt[] pool_stride, SymInt[] pool_padding, bool[3] mask, str kernel_name=\"\") -> (Tensor, Tensor, "
      "Tensor)");
  // the maxima, and where in each window they lay (uint8, int32 for windows over 255 cells)
  m.def(
      "max_pool(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "bool ceil_mode, bool save_offsets, str kernel_name=\"\") -> (Tensor, Tensor)");
  // gradient of the input
  m.def(
      "max_pool_backward(Tensor grad_output, Tensor offsets, SymInt[] input_size, SymInt[] kernel_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode, str kernel_name=\"\") -> "
      "Tensor");
  // input at the offsets: the gradient of max_pool_backward
  m.def(
      "max_pool_gather(Tensor input, Tensor offsets, SymInt[] kernel_size, SymInt[] stride, SymInt[] "
      "padding, "
      "SymInt[] dilation, bool ceil_mode, str kernel_name=\"\") -> Tensor");
  // offsets as int64 positions in the input plane
  m.def(
      "max_pool_indices(Tensor offsets, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride, SymInt[] "
      "padding, "
      "SymInt[] dilation, bool ceil_mode, str kernel_name=\"\") -> Tensor");
  // the averages
  m.def(
      "avg_pool(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override, str kernel_name=\"\") -> Tensor");
  // gradient of the input, channels_last where asked for
  m.def(
      "avg_pool_backward(Tensor grad_output, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride, "
      "SymInt[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override, bool channels_last, "
      "str kernel_name=\"\") -> Tensor");
  // y = max_pool(act(batch_norm(input))) by the batch's own statistics, where in each window the maximum lay,
  // and of each channel mean and 1 / sqrt(variance + eps) in float64; no pool_kernel: no pool
  m.def(
      "norm_act_pool(Tensor input, Tensor? weight, Tensor? bias, float eps, str act, SymInt[] pool_kernel, "
      "SymInt[] pool_stride, SymInt[] pool_padding, str kernel_name=\"\") -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // gradients of input, weight and bias, those that mask asks for
  m.def(
      "norm_act_pool_backward(Tensor grad_output, Tensor output, Tensor offsets, Tensor input, Tensor? "
      "weight, "
      "Tensor mean, Tensor invstd, str act, SymInt[] pool_kernel, SymInt[] pool_stride, SymInt[] "
      "pool_padding, "
      "bool[3] mask, str kernel_name=\"\") -> (Tensor, Tensor, Tensor)");
  // the same, but the input's gradient is written over it
  m.def(
      "norm_act_pool_backward_(Tensor grad_output, Tensor output, Tensor offsets, Tensor(a!) input, Tensor? "
      "weight, Tensor mean, Tensor invstd, str act, SymInt[] pool_kernel, SymInt[] pool_stride, SymInt[] "
      "pool_padding, bool[2] mask, str kernel_name=\"\") -> (Tensor, Tensor)");
  // y = act(input weight^T + bias)
  m.def("linear_act(Tensor input, Tensor weight, Tensor? bias, str act, str kernel_name=\"\") -> Tensor");
  // gradient of the input
  m.def("linear_dgrad(Tensor grad_output, Tensor weight, str kernel_name=\"\") -> Tensor");
  // gradients of weight and bias; the latter empty unless asked for
  m.def(
      "linear_wgrad(Tensor grad_output, Tensor input, bool bias, str kernel_name=\"\") -> (Tensor, Tensor)");
  // gradients of input, weight and bias, those that mask asks for
  m.def(
      "linear_act_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, str act, bool[3] "
      "mask, "
      "str kernel_name=\"\") -> (Tensor, Tensor, Tensor)");
  // the last stage of a plan (core/chain.h), and what chain_backward will need; empty unless asked for
  m.def(
      "chain(Tensor input, Tensor[] params, int[] plan, bool save, str kernel_name=\"\") -> (Tensor, "
      "Tensor)");
  // gradients of input and parameters, those that mask asks for: bit 0 is the input's, bit i + 1 that of
  // params[i]
  m.def(
      "chain_backward(Tensor grad_output, Tensor output, Tensor input, Tensor[] params, Tensor saved, int[] "
      "plan, int mask, str kernel_name=\"\") -> (Tensor, Tensor[])");
}

namespace {

// In either mode of differentiation.
bool requires_gradient(const at::Tensor& t) {
  if (at::GradMode::is_enabled() && t.requires_grad()) return true;
  return c10::AutogradState::get_tls_state().get_fw_grad_mode() && t.defined() && t._fw_grad(0).defined();
}
bool requires_gradient(const std::optional<at::Tensor>& t) { return t && requires_gradient(*t); }
bool requires_gradient(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& t) { return requires_gradient(t); });
}
template <class Other>
bool requires_gradient(const Other&) {
  return false;
}

// Python's functions that give the operators a gradient, by their names (fastconv/autograd/operators.py).
// Never freed: the interpreter may be gone by then.
PyObject* gradients = nullptr;

void call_with_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  pybind11::gil_scoped_acquire gil;
  const c10::FunctionSchema& schema = op.schema();
  PyObject* function = gradients ? PyDict_GetItemString(gradients, schema.name().c_str()) : nullptr;
  TORCH_CHECK(function, schema.name(),
              " is a raw operator without a gradient, and an argument requires one: call "
              "fastconv.functional instead, or detach() it, or use torch.no_grad()");
  const size_t count = schema.arguments().size();
  pybind11::tuple args(count);
  for (size_t i = 0; i < count; ++i) args[i] = torch::jit::toPyObject(torch::jit::peek(*stack, i, count));
  const pybind11::object result = pybind11::reinterpret_borrow<pybind11::object>(function)(*args);
  torch::jit::drop(*stack, count);
  const bool one = schema.returns().size() == 1;
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    const pybind11::object each = one ? result : pybind11::object(result[pybind11::int_(i)]);
    stack->push_back(torch::jit::toIValue(each, schema.returns()[i].type()));
  }
}

}  // namespace

// A tuple or list of ints, plain ones, as a chain's plan is, or symbolic ones too: torch's own conversion
// takes a longer way with each.
template <class Int, class Array>
struct Ints {
  c10::SmallVector<Int, 6> values;
  operator Array() const { return values; }
};
using PlainInts = Ints<int64_t, at::IntArrayRef>;
using SymInts = Ints<c10::SymInt, c10::SymIntArrayRef>;

template <class Int, class Array>
struct pybind11::detail::type_caster<Ints<Int, Array>> {
  using Type = Ints<Int, Array>;
  PYBIND11_TYPE_CASTER(Type, const_name("tuple[int, ...]"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) && !PyList_Check(source.ptr())) return false;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(source.ptr());
    PyObject* const* items = PySequence_Fast_ITEMS(source.ptr());
    value.values.reserve(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      int too_large = 1;
      const int64_t plain = PyLong_Check(items[i]) ? PyLong_AsLongLongAndOverflow(items[i], &too_large) : 0;
      if (!too_large) {
        value.values.push_back(Int(plain));
      } else if constexpr (std::is_same_v<Int, c10::SymInt>) {
        make_caster<c10::SymInt> other;
        if (!other.load(items[i], true)) return false;
        value.values.push_back(cast_op<c10::SymInt>(other));
      } else {
        return false;
      }
    }
    return true;
  }
};

namespace {

namespace py = pybind11;
using fastconv::Sizes;

// What Python's arguments turn into, where that is not the operator's own type.
template <class Arg>
struct FromPython {
  using type = Arg;
};
template <>
struct FromPython<at::TensorList> {
  using type = std::vector<at::Tensor>;
};

template <>
struct FromPython<at::IntArrayRef> {
  using type = PlainInts;
};
template <>
struct FromPython<c10::SymIntArrayRef> {
  using type = SymInts;
};

// An operator by its name, and what is defined for it beside its schema.
template <class Signature>
struct Operator;
template <class Return, class... Args>
struct Operator<Return(Args...)> {
  const char* name;
  c10::TypedOperatorHandle<Return(Args...)> op;

  explicit Operator(const char* name) : name(name), op(fastconv::find_operator<Return(Args...)>(name)) {}

  // A function in Python: the way of torch.ops without its argument parser.
  void define_entry(py::module_& m) const {
    m.def(name, [op = op](typename FromPython<Args>::type... args) {
      py::gil_scoped_release without_gil;
      return op.call(std::forward<decltype(args)>(args)...);
    });
  }

  // Kernels have no gradient; a call that would lose one goes by Python's.
  void define_gradient(torch::Library& m) const {
    m.impl(name, [op = op](c10::DispatchKeySet keys, Args... args) -> Return {
      if ((requires_gradient(args) || ...))
        return c10::impl::BoxedKernelWrapper<Return(Args...)>::call(
            c10::BoxedKernel::makeFromFunction<&call_with_gradient>(), op, keys, std::forward<Args>(args)...);
      return op.redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
    });
  }
};

using T = const at::Tensor&;
using Ts = at::TensorList;
using OptionalT = const std::optional<at::Tensor>&;
using Axes = c10::SymIntArrayRef;
using Int = c10::SymInt;
using OptionalInt = std::optional<int64_t>;
using Plan = at::IntArrayRef;
using Str = c10::string_view;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using TwoLists = std::tuple<at::Tensor, std::vector<at::Tensor>>;
using Mask = std::array<bool, 3>;

template <class Visit>
void for_each_operator(const Visit& visit) {
  visit(Operator<at::Tensor(T, T, OptionalT, Axes, Axes, Axes, Int, Str)>("conv_fprop"));
  visit(Operator<at::Tensor(T, T, Axes, Axes, Axes, Axes, Int, Str)>("conv_dgrad"));
  visit(Operator<Two(T, T, Axes, Axes, Axes, Axes, Int, bool, Str)>("conv_wgrad"));
  visit(Operator<Two(T, T, OptionalT, Axes, Axes, Axes, Int, Str, Axes, Axes, Axes, bool, Str)>(
      "conv_act_pool"));
  visit(Operator<Three(T, T, T, T, T, Axes, Axes, Axes, Int, Str, Axes, Axes, Axes, Mask, Str)>(
      "conv_act_pool_backward"));
  visit(Operator<Two(T, Axes, Axes, Axes, Axes, bool, bool, Str)>("max_pool"));
  visit(Operator<at::Tensor(T, T, Axes, Axes, Axes, Axes, Axes, bool, Str)>("max_pool_backward"));
  visit(Operator<at::Tensor(T, T, Axes, Axes, Axes, Axes, bool, Str)>("max_pool_gather"));
  visit(Operator<at::Tensor(T, Axes, Axes, Axes, Axes, Axes, bool, Str)>("max_pool_indices"));
  visit(Operator<at::Tensor(T, Axes, Axes, Axes, bool, bool, OptionalInt, Str)>("avg_pool"));
  visit(Operator<at::Tensor(T, Axes, Axes, Axes, Axes, bool, bool, OptionalInt, bool, Str)>(
      "avg_pool_backward"));
  visit(Operator<Four(T, OptionalT, OptionalT, double, Str, Axes, Axes, Axes, Str)>("norm_act_pool"));
  visit(Operator<Three(T, T, T, T, OptionalT, T, T, Str, Axes, Axes, Axes, Mask, Str)>(
      "norm_act_pool_backward"));
  visit(Operator<Two(T, T, T, T, OptionalT, T, T, Str, Axes, Axes, Axes, std::array<bool, 2>, Str)>(
      "norm_act_pool_backward_"));
  visit(Operator<at::Tensor(T, T, OptionalT, Str, Str)>("linear_act"));
  visit(Operator<at::Tensor(T, T, Str)>("linear_dgrad"));
  visit(Operator<Two(T, T, bool, Str)>("linear_wgrad"));
  visit(Operator<Three(T, T, T, T, Str, Mask, Str)>("linear_act_backward"));
  visit(Operator<Two(T, Ts, Plan, bool, Str)>("chain"));
  visit(Operator<TwoLists(T, T, T, Ts, T, Plan, int64_t, Str)>("chain_backward"));
}

template <class Enum>
Enum value_of(const char* what, const std::string& name,
              std::initializer_list<std::pair<const char*, Enum>> values) {
  for (const auto& [known, value] : values)
    if (name == known) return value;
  fastconv::fail(what, " is unknown: ", name);
}

py::list as_python(const std::vector<fastconv::Explanation>& explanations) {
  py::list passes;
  for (const fastconv::Explanation& pass : explanations) {
    py::list rows;
    for (const fastconv::Considered& row : pass.rows)
      rows.append(py::dict(py::arg("name") = row.name, py::arg("reason") = row.reason,
                           py::arg("cost_us") = row.reason ? py::object(py::none()) : py::float_(row.cost_us),
                           py::arg("built") = row.built));
    passes.append(
        py::dict(py::arg("pass_") = pass.pass, py::arg("chosen") = pass.chosen, py::arg("rows") = rows));
  }
  return passes;
}

void define_introspection(py::module_& m) {
  using namespace fastconv;
  m.def("list_rows", [] {
    py::list rows;
    for (const RowInfo& row : list_rows())
      rows.append(py::dict(
          py::arg("name") = row.name, py::arg("file") = row.file, py::arg("source_hash") = row.source_hash,
          py::arg("op") = row.op, py::arg("pass_") = row.pass, py::arg("device") = row.device,
          py::arg("dtypes") = row.dtypes, py::arg("layouts") = row.layouts, py::arg("built") = row.built));
    return rows;
  });
  m.def(
      "explain",
      [](const std::string& op, const std::string& device, const std::string& dtype,
         const std::string& layout, int level, Sizes<int64_t> input, Sizes<int64_t> weight,
         Sizes<int64_t> stride, Sizes<int64_t> padding, Sizes<int64_t> dilation, int64_t groups,
         Sizes<int64_t> pool_kernel, Sizes<int64_t> pool_stride, Sizes<int64_t> pool_padding, bool ceil_mode,
         Sizes<int64_t> plan, std::vector<Sizes<int64_t>> params) {
        Question q;
        q.op = op;
        q.device = value_of<Device>("device", device, {{"cpu", Device::cpu}, {"cuda", Device::cuda}});
        q.dtype = value_of<Dtype>("dtype", dtype,
                                  {{"float32", Dtype::f32},
                                   {"float64", Dtype::f64},
                                   {"float16", Dtype::f16},
                                   {"bfloat16", Dtype::bf16}});
        q.layout = value_of<Layout>(
            "layout", layout, {{"contiguous", Layout::contiguous}, {"channels_last", Layout::channels_last}});
        q.level = level;
        q.input = input, q.weight = weight, q.stride = stride, q.padding = padding, q.dilation = dilation;
        q.groups = groups;
        q.pool_kernel = pool_kernel, q.pool_stride = pool_stride, q.pool_padding = pool_padding;
        q.ceil_mode = ceil_mode;
        q.plan = plan, q.params = params;
        return as_python(explain(q));
      },
      py::kw_only(), py::arg("op"), py::arg("device"), py::arg("dtype"), py::arg("layout"), py::arg("level"),
      py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"), py::arg("pool_kernel"), py::arg("pool_stride"), py::arg("pool_padding"),
      py::arg("ceil_mode"), py::arg("plan"), py::arg("params"));
  // The function's result, and what each launch of it was, as `explain` has it.
  m.def("watch", [](const py::function& function) {
    Watch watch;
    py::object result = function();
    return py::make_tuple(result, as_python(watch.seen));
  });
  m.def("is_row_name", [](const std::string& name) { return is_row_name(name); });
  m.def("build_info", [] {
    return py::dict(py::arg("torch") = FASTCONV_BUILT_TORCH, py::arg("cuda") = why_no_cuda() == nullptr,
                    py::arg("cuda_reason") = FASTCONV_CUDA_REASON,
                    py::arg("cuda_archs") = FASTCONV_CUDA_ARCHS, py::arg("compiler") = __VERSION__,
                    py::arg("cpu_isa") = cpu::isa_name(cpu::isa()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  for_each_operator([&](const auto& op) { op.define_gradient(m); });
}

PYBIND11_MODULE(_C, m) {
  m.def("set_gradients", [](py::dict functions) { gradients = functions.release().ptr(); });
  for_each_operator([&](const auto& op) { op.define_entry(m); });
  fastconv::define_eager(m.ptr());
  define_introspection(m);
}

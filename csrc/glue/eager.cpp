// SPDX-License-Identifier: MIT
// Layers called from Python on plain tensors with plain arguments, from end to end in C++, gradient included:
// Python takes most of the time of a small call. Each function returns None where anything is unusual: a
// subclass of Tensor, autocast, a tracer, a transform, an argument that needs a closer look. Then
// fastconv/functional.py goes the long way, by the Functions of fastconv/autograd, to the same values,
// names in the graph and errors.
#include "glue/eager.h"

#include <torch/csrc/utils/pybind.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "glue/operators.h"
#include "glue/tensor.h"

namespace fastconv {

namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using T = const Tensor&;
using OptionalT = const OptionalTensor&;
using Int = c10::SymInt;
using Ints = c10::SmallVector<Int, 6>;
using Axes = c10::SymIntArrayRef;
using Str = c10::string_view;
using Two = std::tuple<Tensor, Tensor>;

// Whether the operators, called with the tensor, reach the kernels with nothing but autograd in between.
bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet plain({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                                       DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
                                       DispatchKey::BackendSelect});
  const auto here = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet keys = (t.key_set() | here.included_) - here.excluded_;
  return (keys.raw_repr() & ~plain.raw_repr()) == 0 && !t._fw_grad(0).defined();
}

// --- gradients

// What a node keeps for its backward.
struct Kept {
  variable_list tensors;
  std::vector<int64_t> ints;
  Str kernel;
  size_t taken = 0;

  template <class... Arrays>
  void add(const Arrays&... arrays) {
    const auto plain = [](const Int& each) { return each.expect_int(); };
    (std::transform(arrays.begin(), arrays.end(), std::back_inserter(ints), plain), ...);
  }
  Ints take(size_t count) {
    taken += count;
    return Ints(ints.begin() + taken - count, ints.begin() + taken);
  }
  int64_t take() { return ints[taken++]; }

  static Kept of(const AutogradContext& ctx) {
    const auto& data = ctx.saved_data;
    return {ctx.get_saved_variables(), data.at("ints").toIntVector(), data.at("kernel").toStringRef()};
  }
};

// The node of a layer's call. torch::autograd::Function<Layer>::apply makes one too, and takes longer: it
// asks which outputs are views, or inputs, or not differentiable.
template <class Layer>
class Node : public torch::autograd::CppNode<Layer> {
 public:
  explicit Node(const Layer& layer) {
    torch::autograd::edge_list edges;
    for (const Tensor* input : layer.inputs())
      edges.push_back(input->defined() ? torch::autograd::impl::gradient_edge(*input)
                                       : torch::autograd::Edge());
    this->is_variable_input_.assign(edges.size(), true);
    this->set_next_edges(std::move(edges));
    this->ctx_.set_materialize_grads(false);
  }

  void keep(Kept&& kept) {
    this->ctx_.save_for_backward(std::move(kept.tensors));
    this->ctx_.saved_data["ints"] = std::move(kept.ints);
    this->ctx_.saved_data["kernel"] = std::string(kept.kernel);
    this->save_variables_to_ctx();
  }

  std::string name() const override { return Layer::name(); }

  // Tells Python of the nodes' type, which `grad_fn` shows.
  static void define_type() {
    static const std::string name = Layer::name();
    static PyTypeObject type;
    torch::autograd::_initFunctionPyTypeObject(type, name.c_str(), nullptr, nullptr);
    torch::autograd::registerCppFunction(typeid(Node), &type);
  }
};

// As this torch holds nodes: by a count in each, or, as 2.11 does, by shared_ptr.
template <class Node, class Layer>
auto new_node(const Layer& layer) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>)
    return c10::make_intrusive<Node>(layer);
  else
    return std::shared_ptr<Node>(new Node(layer), [](auto* node) { deleteNode(node); });
}

template <class Layer>
Tensor run(const Layer& layer) {
  py::gil_scoped_release without_gil;
  const auto forward = [&](Kept* kept) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return layer.forward(kept);
  };
  bool wants_gradient = false;
  if (at::GradMode::is_enabled())
    for (const Tensor* input : layer.inputs()) wants_gradient = wants_gradient || input->requires_grad();
  if (!wants_gradient) return forward(nullptr);
  const auto node = new_node<Node<Layer>>(layer);
  node->set_ctx_grad_fn(node);
  Kept kept{{}, {}, layer.kernel};
  const Tensor output = forward(&kept);
  torch::autograd::set_history(output, node);
  node->keep(std::move(kept));
  return output;
}

// Calls an operator of a backward pass: by Python's Function where its result may be differentiated, mapped
// over or traced in turn.
template <class Return, class... Params, class... Args>
Return call(const char* name, const c10::TypedOperatorHandle<Return(Params...)>& op, const Tensor& grad,
            const Args&... args) {
  if (!at::GradMode::is_enabled() && is_plain(grad)) return op.call(grad, args...);
  const auto to_python = [](const auto& arg) -> py::object {
    if constexpr (std::is_same_v<decltype(arg), const Ints&>)
      return py::tuple(py::cast(std::vector<Int>(arg.begin(), arg.end())));
    else
      return py::cast(arg);
  };
  py::gil_scoped_acquire gil;
  const py::object function = py::module_::import("fastconv.autograd.operators").attr("GRADIENTS")[name];
  return function(grad, to_python(args)...).template cast<Return>();
}

// --- the layers

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

template <size_t axes>
struct Conv {
  static constexpr bool is_traceable = false;

  const Tensor &input, &weight, &bias;
  Ints stride, padding, dilation;
  Int groups;
  Str kernel;

  static std::string name() { return "Conv" + std::to_string(axes) + "dBackward"; }
  std::array<const Tensor*, 3> inputs() const { return {&input, &weight, &bias}; }

  Tensor forward(Kept* kept) const {
    static const auto fprop =
        find_operator<Tensor(T, T, OptionalT, Axes, Axes, Axes, Int, Str)>("conv_fprop");
    if (kept) {
      kept->tensors = {weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor()};
      kept->add(input.sym_sizes(), weight.sym_sizes(), stride, padding, dilation, Axes(groups));
    }
    return fprop.call(input, weight, optional(bias), stride, padding, dilation, groups, kernel);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Dgrad = Tensor(T, T, Axes, Axes, Axes, Axes, Int, Str);
    using Wgrad = Two(T, T, Axes, Axes, Axes, Axes, Int, bool, Str);
    static const auto dgrad = find_operator<Dgrad>("conv_dgrad");
    static const auto wgrad = find_operator<Wgrad>("conv_wgrad");
    const Tensor& grad = grads[0];
    variable_list results(3);
    if (!grad.defined()) return results;
    Kept kept = Kept::of(*ctx);
    const Ints input_size = kept.take(axes + 2), weight_size = kept.take(axes + 2);
    const Ints stride = kept.take(axes), padding = kept.take(2 * axes), dilation = kept.take(axes);
    const Int groups = kept.take();
    const bool wants_bias = ctx->needs_input_grad(2);
    if (ctx->needs_input_grad(0))
      results[0] = call("conv_dgrad", dgrad, grad, kept.tensors[1], input_size, stride, padding, dilation,
                        groups, kept.kernel);
    if (ctx->needs_input_grad(1)) {
      std::tie(results[1], results[2]) = call("conv_wgrad", wgrad, grad, kept.tensors[0], weight_size, stride,
                                              padding, dilation, groups, wants_bias, kept.kernel);
    } else if (wants_bias) {
      std::vector<int64_t> summed{0};
      for (int64_t axis = 2; axis < grad.dim(); ++axis) summed.push_back(axis);
      results[2] = grad.sum(summed);
    }
    if (!wants_bias) results[2] = Tensor();
    return results;
  }
};

struct Linear {
  static constexpr bool is_traceable = false;

  const Tensor &input, &weight, &bias;
  Str kernel;

  static std::string name() { return "LinearBackward"; }
  std::array<const Tensor*, 3> inputs() const { return {&input, &weight, &bias}; }

  Tensor forward(Kept* kept) const {
    static const auto linear_act = find_operator<Tensor(T, T, OptionalT, Str, Str)>("linear_act");
    if (kept)
      kept->tensors = {weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor()};
    return linear_act.call(input, weight, optional(bias), "none", kernel);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto dgrad = find_operator<Tensor(T, T, Str)>("linear_dgrad");
    static const auto wgrad = find_operator<Two(T, T, bool, Str)>("linear_wgrad");
    const Tensor& grad = grads[0];
    variable_list results(3);
    if (!grad.defined()) return results;
    const Kept kept = Kept::of(*ctx);
    const bool wants_weight = ctx->needs_input_grad(1), wants_bias = ctx->needs_input_grad(2);
    if (ctx->needs_input_grad(0))
      results[0] = call("linear_dgrad", dgrad, grad, kept.tensors[1], kept.kernel);
    if (wants_weight || wants_bias) {
      const Tensor input = wants_weight ? kept.tensors[0] : grad.narrow(-1, 0, 0);
      std::tie(results[1], results[2]) = call("linear_wgrad", wgrad, grad, input, wants_bias, kept.kernel);
    }
    if (!wants_weight) results[1] = Tensor();
    if (!wants_bias) results[2] = Tensor();
    return results;
  }
};

template <size_t axes>
struct MaxPool {
  static constexpr bool is_traceable = false;

  const Tensor& input;
  Ints kernel_size, stride, padding, dilation;
  bool ceil_mode;
  Str kernel;

  static std::string name() { return "MaxPool" + std::to_string(axes) + "dBackward"; }
  std::array<const Tensor*, 1> inputs() const { return {&input}; }

  Tensor forward(Kept* kept) const {
    static const auto max_pool = find_operator<Two(T, Axes, Axes, Axes, Axes, bool, bool, Str)>("max_pool");
    auto [output, offsets] =
        max_pool.call(input, kernel_size, stride, padding, dilation, ceil_mode, kept != nullptr, kernel);
    if (kept) {
      kept->tensors = {offsets};
      kept->ints = {ceil_mode};
      kept->add(input.sym_sizes(), kernel_size, stride, padding, dilation);
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using MaxPoolBackward = Tensor(T, T, Axes, Axes, Axes, Axes, Axes, bool, Str);
    static const auto max_pool_backward = find_operator<MaxPoolBackward>("max_pool_backward");
    if (!grads[0].defined()) return {Tensor()};
    Kept kept = Kept::of(*ctx);
    const bool ceil_mode = kept.take();
    const Ints input_size = kept.take(axes + 2), kernel_size = kept.take(axes), stride = kept.take(axes);
    const Ints padding = kept.take(axes), dilation = kept.take(axes);
    return {call("max_pool_backward", max_pool_backward, grads[0], kept.tensors[0], input_size, kernel_size,
                 stride, padding, dilation, ceil_mode, kept.kernel)};
  }
};

// --- Python's functions

// Null where it is no plain tensor; None, where that may be, is an undefined one.
const Tensor* read_tensor(PyObject* value, bool optional = false) {
  static const Tensor undefined;
  if (optional && value == Py_None) return &undefined;
  if (!THPVariable_CheckExact(value)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(value);
  return is_plain(tensor) ? &tensor : nullptr;
}

bool read_int(PyObject* value, Int& to) {
  int overflow = 1;
  to = PyLong_CheckExact(value) ? PyLong_AsLongLongAndOverflow(value, &overflow) : 0;
  return !overflow;
}

// An int, or a tuple of one for each axis.
bool read_ints(PyObject* value, size_t axes, Ints& to) {
  const bool many = PyTuple_CheckExact(value);
  if (many && PyTuple_GET_SIZE(value) != Py_ssize_t(axes)) return false;
  to.resize(axes);
  for (size_t i = 0; i < axes; ++i)
    if (!read_int(many ? PyTuple_GET_ITEM(value, i) : value, to[i])) return false;
  return true;
}

Str read_text(PyObject* value) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(value, &size);
  if (!data) throw python_error();
  return {data, size_t(size)};
}

template <class Layer>
PyObject* wrap(const Layer& layer) {
  return THPVariable_Wrap(run(layer));
}

bool is_overridden() { return at::impl::torch_function_mode_enabled(); }

// Calls f(std::integral_constant) for the number of axes, 1 to 3.
template <class F>
PyObject* with_axes(PyObject* axes, const F& f) {
  switch (PyLong_AsLong(axes)) {
    case 1:
      return f(std::integral_constant<size_t, 1>());
    case 2:
      return f(std::integral_constant<size_t, 2>());
    default:
      return f(std::integral_constant<size_t, 3>());
  }
}

// eager_conv(axes, input, weight, bias, stride, padding, dilation, groups, kernel)
PyObject* eager_conv(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto input = read_tensor(args[1]), weight = read_tensor(args[2]), bias = read_tensor(args[3], true);
  if (is_overridden() || !input || !weight || !bias) Py_RETURN_NONE;
  return with_axes(args[0], [&](auto axes) -> PyObject* {
    if (input->dim() != int64_t(axes) + 2 || weight->dim() != input->dim()) Py_RETURN_NONE;
    Conv<axes> layer{*input, *weight, *bias, {}, {}, {}, 1, read_text(args[8])};
    if (!read_ints(args[4], axes, layer.stride) || !read_ints(args[5], axes, layer.padding) ||
        !read_ints(args[6], axes, layer.dilation) || !read_int(args[7], layer.groups))
      Py_RETURN_NONE;
    const Ints fronts = layer.padding;
    layer.padding.append(fronts.begin(), fronts.end());  // the backs
    return wrap(layer);
  });
  END_HANDLE_TH_ERRORS
}

// eager_linear(input, weight, bias, kernel)
PyObject* eager_linear(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto input = read_tensor(args[0]), weight = read_tensor(args[1]), bias = read_tensor(args[2], true);
  if (is_overridden() || !input || !weight || !bias) Py_RETURN_NONE;
  return wrap(Linear{*input, *weight, *bias, read_text(args[3])});
  END_HANDLE_TH_ERRORS
}

// eager_max_pool(axes, input, kernel_size, stride, padding, dilation, ceil_mode, kernel)
PyObject* eager_max_pool(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto input = read_tensor(args[1]);
  if (is_overridden() || !input) Py_RETURN_NONE;
  return with_axes(args[0], [&](auto axes) -> PyObject* {
    if (input->dim() != int64_t(axes) + 2) Py_RETURN_NONE;
    MaxPool<axes> layer{*input, {}, {}, {}, {}, args[6] == Py_True, read_text(args[7])};
    PyObject* stride = args[3] == Py_None ? args[2] : args[3];
    if (!read_ints(args[2], axes, layer.kernel_size) || !read_ints(stride, axes, layer.stride) ||
        !read_ints(args[4], axes, layer.padding) || !read_ints(args[5], axes, layer.dilation) ||
        !PyBool_Check(args[6]))
      Py_RETURN_NONE;
    return wrap(layer);
  });
  END_HANDLE_TH_ERRORS
}

// eager_chain(input, plan, params, kernel), where nothing wants a gradient
PyObject* eager_chain(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  static const auto chain = find_operator<Two(T, at::TensorList, at::IntArrayRef, bool, Str)>("chain");
  const auto input = read_tensor(args[0]);
  if (is_overridden() || !input || !PyTuple_CheckExact(args[1]) || !PyTuple_CheckExact(args[2]))
    Py_RETURN_NONE;
  c10::SmallVector<int64_t, 64> plan;
  Int each;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) {
    if (!read_int(PyTuple_GET_ITEM(args[1], i), each)) Py_RETURN_NONE;
    plan.push_back(each.expect_int());
  }
  const bool linear_first = plan.empty() || plan[0] == 1;
  if (linear_first && input->dim() != 2) Py_RETURN_NONE;
  bool wants_gradient = input->requires_grad();
  c10::SmallVector<Tensor, 16> params;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[2]); ++i) {
    const auto param = read_tensor(PyTuple_GET_ITEM(args[2], i));
    if (!param) Py_RETURN_NONE;
    wants_gradient = wants_gradient || param->requires_grad();
    params.push_back(*param);
  }
  if (wants_gradient && at::GradMode::is_enabled()) Py_RETURN_NONE;
  const Str kernel = read_text(args[3]);
  Tensor output;
  {
    py::gil_scoped_release without_gil;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = std::get<0>(chain.call(*input, params, plan, false, kernel));
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

template <class... Layers>
void define_types() {
  (Node<Layers>::define_type(), ...);
}

PyMethodDef method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          nullptr};
}

}  // namespace

void define_eager(PyObject* module) {
  static PyMethodDef methods[] = {method("eager_chain", eager_chain),
                                  method("eager_conv", eager_conv),
                                  method("eager_linear", eager_linear),
                                  method("eager_max_pool", eager_max_pool),
                                  {}};
  if (PyModule_AddFunctions(module, methods) != 0) throw python_error();
  define_types<Conv<1>, Conv<2>, Conv<3>, Linear, MaxPool<1>, MaxPool<2>, MaxPool<3>>();
}

}  // namespace fastconv

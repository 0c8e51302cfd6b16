// SPDX-License-Identifier: MIT
#include "core/composed.h"

namespace fastconv::composed {

namespace {

// A dense tensor of workspace.
View dense_view(Layout layout, int64_t C, const Extent3& size, void* data) {
  if (layout == Layout::channels_last) return {data, size.cells() * C, 1, size.h * size.w * C, size.w * C, C};
  return {data, C * size.cells(), size.cells(), size.h * size.w, size.w, 1};
}

// The convolution's own output, before the pool: in the layout of the call.
int64_t unpooled_bytes(const ConvArgs& a) {
  return a.shape.N * a.shape.K * a.shape.out_cells() * dtype_size(a.dtype);
}

View unpooled_view(const ConvArgs& a, void* data) {
  return dense_view(a.layout, a.shape.K, {a.shape.Z, a.shape.P, a.shape.Q}, data);
}

ConvArgs convolution_of(const ConvArgs& a, void* unpooled) {
  ConvArgs conv = a;
  conv.y = unpooled_view(a, unpooled);
  conv.epilogue.pool = Window{};
  conv.epilogue.offsets = View{};
  return conv;
}

PoolArgs pool_of(const ConvArgs& a, void* unpooled) {
  const ConvShape& s = a.shape;
  PoolArgs pool;
  pool.dtype = a.dtype;
  pool.target = a.target;
  pool.layout = a.layout;
  pool.N = s.N, pool.C = s.K, pool.D = s.Z, pool.H = s.P, pool.W = s.Q;
  pool.window = a.epilogue.pool;
  pool.x = unpooled_view(a, unpooled);
  pool.y = a.y;
  pool.offsets = a.epilogue.offsets;
  pool.offset = a.epilogue.offsets.data ? offset_type(pool.window.kernel.cells()) : Offset::none;
  return pool;
}

}  // namespace

double conv_act_pool_cost(const ConvArgs& a) {
  const Tables& t = tables(a.target.device);
  const double conv = cost(t.conv_fprop, convolution_of(a, nullptr));
  return a.epilogue.pools() ? conv + cost(t.max_pool, pool_of(a, nullptr)) : conv;
}

int64_t conv_act_pool_workspace(const ConvArgs& a) {
  const Tables& t = tables(a.target.device);
  const int64_t conv = workspace(t.conv_fprop, convolution_of(a, nullptr));
  return a.epilogue.pools()
             ? align(unpooled_bytes(a)) + std::max(conv, workspace(t.max_pool, pool_of(a, nullptr)))
             : conv;
}

void conv_act_pool(const ConvArgs& a, void* workspace, void* stream) {
  const Tables& t = tables(a.target.device);
  if (!a.epilogue.pools()) return launch(t.conv_fprop, a, workspace, stream);
  void* rest = after(workspace, unpooled_bytes(a));
  launch(t.conv_fprop, convolution_of(a, workspace), rest, stream);
  launch(t.max_pool, pool_of(a, workspace), rest, stream);
}

namespace {

// The gradient at the convolution's output, from the gradient at the pool's: through the gate of the ReLU,
// then unpooled. Where nothing pools, the window is 1x1 and only the gate is left.
PoolArgs unpool_of(const ConvActPoolBackwardArgs& a, void* unpooled) {
  const ConvShape& s = a.conv.shape;
  PoolArgs pool = pool_of(a.conv, unpooled);
  if (!a.conv.epilogue.pools()) pool.window.out = {s.Z, s.P, s.Q};
  pool.y = a.grad_y;
  if (a.conv.epilogue.act == Act::relu) pool.gate = a.conv.y;
  return pool;
}

// Whether the gradient at the convolution's output differs from grad_y.
bool changes_gradient(const ConvActPoolBackwardArgs& a) {
  return a.conv.epilogue.pools() || a.conv.epilogue.act != Act::none;
}

ConvArgs pass_of(const ConvActPoolBackwardArgs& a, View grad_conv) {
  ConvArgs pass = a.conv;
  pass.y = grad_conv;
  pass.epilogue = Epilogue{};
  return pass;
}

ConvArgs dgrad_of(const ConvActPoolBackwardArgs& a, View grad_conv) {
  ConvArgs pass = pass_of(a, grad_conv);
  pass.x = a.grad_x;
  return pass;
}

ConvArgs wgrad_of(const ConvActPoolBackwardArgs& a, View grad_conv) {
  ConvArgs pass = pass_of(a, grad_conv);
  pass.w = a.grad_w;
  pass.bias_grad = a.grad_b;
  return pass;
}

View planned_gradient(const ConvActPoolBackwardArgs& a) {
  return changes_gradient(a) ? unpooled_view(a.conv, nullptr) : a.grad_y;
}

}  // namespace

double conv_act_pool_backward_cost(const ConvActPoolBackwardArgs& a) {
  const Tables& t = tables(a.conv.target.device);
  double sum = 0;
  if (a.wants_x()) sum += cost(t.conv_dgrad, dgrad_of(a, planned_gradient(a)));
  if (a.wants_w()) sum += cost(t.conv_wgrad, wgrad_of(a, planned_gradient(a)));
  if (changes_gradient(a)) sum += cost(t.max_pool_backward, unpool_of(a, nullptr));
  return sum;
}

int64_t conv_act_pool_backward_workspace(const ConvActPoolBackwardArgs& a) {
  const Tables& t = tables(a.conv.target.device);
  const View gradient = planned_gradient(a);
  int64_t rest = std::max(workspace(t.conv_dgrad, dgrad_of(a, gradient)),
                          workspace(t.conv_wgrad, wgrad_of(a, gradient)));
  if (!changes_gradient(a)) return rest;
  rest = std::max(rest, workspace(t.max_pool_backward, unpool_of(a, nullptr)));
  return align(unpooled_bytes(a.conv)) + rest;
}

void conv_act_pool_backward(const ConvActPoolBackwardArgs& a, void* workspace, void* stream) {
  const Tables& t = tables(a.conv.target.device);
  View gradient = a.grad_y;
  void* rest = workspace;
  if (changes_gradient(a)) {
    gradient = unpooled_view(a.conv, workspace);
    rest = after(workspace, unpooled_bytes(a.conv));
    launch(t.max_pool_backward, unpool_of(a, workspace), rest, stream);
  }
  if (a.grad_x.data) launch(t.conv_dgrad, dgrad_of(a, gradient), rest, stream);
  if (a.grad_w.data || a.grad_b) launch(t.conv_wgrad, wgrad_of(a, gradient), rest, stream);
}

namespace {

// Before the pool: the norm's output, or its gradient, dense in workspace.
int64_t unpooled_bytes(const NormArgs& a) { return a.N * a.C * a.cells() * dtype_size(a.dtype); }

View unpooled_view(const NormArgs& a, void* data) { return dense_view(a.layout, a.C, {a.D, a.H, a.W}, data); }

// The norm and act alone.
NormArgs norm_of(const NormArgs& a, View y) {
  NormArgs norm = a;
  norm.window = Window{};
  norm.window.out = {a.D, a.H, a.W};
  norm.y = y;
  norm.offsets = View{};
  norm.offset = Offset::none;
  return norm;
}

PoolArgs pool_of(const NormArgs& a, View unpooled) {
  PoolArgs pool;
  pool.dtype = a.dtype;
  pool.target = a.target;
  pool.layout = a.layout;
  pool.N = a.N, pool.C = a.C, pool.D = a.D, pool.H = a.H, pool.W = a.W;
  pool.window = a.window;
  pool.x = unpooled;
  pool.y = a.y;
  pool.offsets = a.offsets;
  pool.offset = a.offset;
  return pool;
}

}  // namespace

const char* norm_act_pool_reject(const NormArgs& a) {
  return a.pools() ? nullptr : "is made of a call that does not pool, and of the pool";
}

double norm_act_pool_cost(const NormArgs& a) {
  const Tables& t = tables(a.target.device);
  const View unpooled = unpooled_view(a, nullptr);
  return cost(t.norm_act_pool, norm_of(a, unpooled)) + cost(t.max_pool, pool_of(a, unpooled));
}

int64_t norm_act_pool_workspace(const NormArgs& a) {
  const Tables& t = tables(a.target.device);
  const View unpooled = unpooled_view(a, nullptr);
  return align(unpooled_bytes(a)) + std::max(workspace(t.norm_act_pool, norm_of(a, unpooled)),
                                             workspace(t.max_pool, pool_of(a, unpooled)));
}

void norm_act_pool(const NormArgs& a, void* workspace, void* stream) {
  const Tables& t = tables(a.target.device);
  const View unpooled = unpooled_view(a, workspace);
  void* rest = after(workspace, unpooled_bytes(a));
  launch(t.norm_act_pool, norm_of(a, unpooled), rest, stream);
  launch(t.max_pool, pool_of(a, unpooled), rest, stream);
}

namespace {

// The gradient before the pool, which the ReLU's gate has passed.
PoolArgs unpool_of(const NormBackwardArgs& a, View unpooled) {
  PoolArgs pool = pool_of(a.norm, unpooled);
  pool.y = a.grad_y;
  if (a.norm.act == Act::relu) pool.gate = a.norm.y;
  return pool;
}

NormBackwardArgs norm_of(const NormBackwardArgs& a, View unpooled) {
  NormBackwardArgs norm = a;
  norm.norm = norm_of(a.norm, unpooled);
  norm.norm.act = Act::none;
  norm.grad_y = unpooled;
  return norm;
}

}  // namespace

const char* norm_act_pool_backward_reject(const NormBackwardArgs& a) { return norm_act_pool_reject(a.norm); }

double norm_act_pool_backward_cost(const NormBackwardArgs& a) {
  const Tables& t = tables(a.norm.target.device);
  const View unpooled = unpooled_view(a.norm, nullptr);
  return cost(t.max_pool_backward, unpool_of(a, unpooled)) +
         cost(t.norm_act_pool_backward, norm_of(a, unpooled));
}

int64_t norm_act_pool_backward_workspace(const NormBackwardArgs& a) {
  const Tables& t = tables(a.norm.target.device);
  const View unpooled = unpooled_view(a.norm, nullptr);
  return align(unpooled_bytes(a.norm)) + std::max(workspace(t.max_pool_backward, unpool_of(a, unpooled)),
                                                  workspace(t.norm_act_pool_backward, norm_of(a, unpooled)));
}

void norm_act_pool_backward(const NormBackwardArgs& a, void* workspace, void* stream) {
  const Tables& t = tables(a.norm.target.device);
  const View unpooled = unpooled_view(a.norm, workspace);
  void* rest = after(workspace, unpooled_bytes(a.norm));
  launch(t.max_pool_backward, unpool_of(a, unpooled), rest, stream);
  launch(t.norm_act_pool_backward, norm_of(a, unpooled), rest, stream);
}

namespace {

// The gate of the ReLU over a matrix: max-pool's backward with a 1x1 window, one channel a column.
PoolArgs gate_of(const LinearActBackwardArgs& a, void* gated) {
  const LinearArgs& l = a.linear;
  PoolArgs gate;
  gate.dtype = l.dtype;
  gate.target = l.target;
  gate.N = l.M, gate.C = l.N;
  gate.x = {gated, l.N, 1, 0, 0, 0};
  gate.y = {a.grad_y.data, a.grad_y.row, a.grad_y.col, 0, 0, 0};
  gate.gate = {l.y.data, l.y.row, l.y.col, 0, 0, 0};
  return gate;
}

LinearArgs pass_of(const LinearActBackwardArgs& a, Matrix grad) {
  LinearArgs pass = a.linear;
  pass.y = grad;
  pass.epilogue = Epilogue{};
  return pass;
}

LinearArgs dgrad_of(const LinearActBackwardArgs& a, Matrix grad) {
  LinearArgs pass = pass_of(a, grad);
  pass.x = a.grad_x;
  return pass;
}

LinearArgs wgrad_of(const LinearActBackwardArgs& a, Matrix grad) {
  LinearArgs pass = pass_of(a, grad);
  pass.w = a.grad_w;
  pass.bias_grad = a.grad_b;
  return pass;
}

bool gates(const LinearActBackwardArgs& a) { return a.linear.epilogue.act != Act::none; }

int64_t gated_bytes(const LinearArgs& l) { return l.M * l.N * dtype_size(l.dtype); }

Matrix gated_view(const LinearActBackwardArgs& a, void* gated) {
  return gates(a) ? Matrix{gated, a.linear.N, 1} : a.grad_y;
}

}  // namespace

double linear_act_backward_cost(const LinearActBackwardArgs& a) {
  const Tables& t = tables(a.linear.target.device);
  const Matrix grad = gated_view(a, nullptr);
  const double gate = gates(a) ? cost(t.max_pool_backward, gate_of(a, nullptr)) : 0;
  return gate + cost(t.linear_dgrad, dgrad_of(a, grad)) + cost(t.linear_wgrad, wgrad_of(a, grad));
}

int64_t linear_act_backward_workspace(const LinearActBackwardArgs& a) {
  const Tables& t = tables(a.linear.target.device);
  const Matrix grad = gated_view(a, nullptr);
  int64_t rest =
      std::max(workspace(t.linear_dgrad, dgrad_of(a, grad)), workspace(t.linear_wgrad, wgrad_of(a, grad)));
  if (!gates(a)) return rest;
  rest = std::max(rest, workspace(t.max_pool_backward, gate_of(a, nullptr)));
  return align(gated_bytes(a.linear)) + rest;
}

void linear_act_backward(const LinearActBackwardArgs& a, void* workspace, void* stream) {
  const Tables& t = tables(a.linear.target.device);
  const Matrix grad = gated_view(a, workspace);
  void* rest = gates(a) ? after(workspace, gated_bytes(a.linear)) : workspace;
  if (gates(a)) launch(t.max_pool_backward, gate_of(a, workspace), rest, stream);
  if (a.grad_x.data) launch(t.linear_dgrad, dgrad_of(a, grad), rest, stream);
  if (a.grad_w.data || a.grad_b) launch(t.linear_wgrad, wgrad_of(a, grad), rest, stream);
}

}  // namespace fastconv::composed

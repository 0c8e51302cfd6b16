// SPDX-License-Identifier: MIT
#include "glue/introspect.h"

#include "core/chain.h"
#include "glue/conv.h"
#include "glue/device.h"
#include "glue/pool.h"
#include "glue/tensor.h"

namespace fastconv {

namespace {

// What the library is built from, by buildtools/sources.py.
std::string source_hash(const std::string& file) {
  static const std::pair<const char*, const char*> hashes[] = {
#include "source_hashes.inc"
  };
  for (const auto& [path, hash] : hashes)
    if (file == path) return hash;
  fail("no source is named ", file);
}

const char* device_name(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

const char* layout_name(Layout layout) {
  return layout == Layout::contiguous      ? "contiguous"
         : layout == Layout::channels_last ? "channels_last"
                                           : "strided";
}

// Strides of a dense [N, C, D, H, W] tensor. The base is a placeholder: explaining reads no data.
View dense(Layout layout, int64_t c, int64_t d, int64_t h, int64_t w) {
  static char placeholder;
  if (layout == Layout::channels_last) return {&placeholder, d * h * w * c, 1, h * w * c, w * c, c};
  return {&placeholder, c * d * h * w, d * h * w, h * w, w, 1};
}

View dense_of(Layout layout, const Sizes<int64_t>& sizes) {
  const Extent3 e = extent3(at::IntArrayRef(sizes).slice(2));
  return dense(layout, sizes[1], e.d, e.h, e.w);
}

template <class Args>
Explanation explain_table(const char* pass, const Table<Args>& table, const Args& args) {
  return explain_table(pass, table, args, choose(table, args).name);
}

template <class Args>
Args common(const Question& q) {
  Args args;
  args.dtype = q.dtype;
  args.target = default_target(q.device);
  if (q.level) args.target.level = q.level;
  args.layout = q.layout;
  return args;
}

std::vector<Explanation> explain_conv(const Question& q) {
  const Tables& t = tables(q.device);
  const auto output = conv_output_size(q.input, q.weight, q.stride, q.padding, q.dilation, q.groups);
  ConvArgs args = common<ConvArgs>(q);
  args.tf32 = allows_tf32(q.device, Layer::conv);
  args.shape = conv_shape(q.input, q.weight, output, q.stride, q.padding, q.dilation, q.groups);
  args.x = dense_of(q.layout, q.input);
  args.w = dense_of(q.layout, q.weight);
  args.y = dense_of(q.layout, output);
  if (q.op == "conv")
    return {explain_table("fprop", t.conv_fprop, args), explain_table("dgrad", t.conv_dgrad, args),
            explain_table("wgrad", t.conv_wgrad, args)};
  args.epilogue.act = Act::relu;
  if (!q.pool_kernel.empty()) {
    const Sizes<int64_t> ones(q.pool_kernel.size(), 1);
    const auto pooled =
        pool_output_size(max_pool_name(2), output, q.pool_kernel, q.pool_stride, q.pool_padding, ones, false);
    args.epilogue.pool = window_of(pooled, q.pool_kernel, q.pool_stride, q.pool_padding, ones);
    args.epilogue.offsets = args.y = dense_of(q.layout, pooled);
  }
  ConvActPoolBackwardArgs backward{args, args.y, args.x, args.w, args.x.data};
  return {explain_table("forward", t.conv_act_pool, args),
          explain_table("backward", t.conv_act_pool_backward, backward)};
}

std::vector<Explanation> explain_pool(const Question& q, const char* op, Table<PoolArgs> Tables::* forward,
                                      Table<PoolArgs> Tables::* backward) {
  const Tables& t = tables(q.device);
  const bool is_max = q.op == "max_pool";
  const Sizes<int64_t> dilation = is_max ? q.dilation : Sizes<int64_t>(q.pool_kernel.size(), 1);
  const auto output =
      pool_output_size(op, q.input, q.pool_kernel, q.pool_stride, q.pool_padding, dilation, q.ceil_mode);
  PoolArgs args = common<PoolArgs>(q);
  const Extent3 in = extent3(at::IntArrayRef(q.input).slice(2));
  args.N = q.input[0], args.C = q.input[1], args.D = in.d, args.H = in.h, args.W = in.w;
  args.window = window_of(output, q.pool_kernel, q.pool_stride, q.pool_padding, dilation);
  args.x = dense_of(q.layout, q.input);
  args.y = dense_of(q.layout, output);
  if (is_max) {
    args.offsets = args.y;
    args.offset = offset_type(args.window.kernel.cells());
  }
  return {explain_table("forward", t.*forward, args), explain_table("backward", t.*backward, args)};
}

std::vector<Explanation> explain_norm(const Question& q) {
  const Tables& t = tables(q.device);
  NormArgs args = common<NormArgs>(q);
  const Extent3 in = extent3(at::IntArrayRef(q.input).slice(2));
  args.N = q.input[0], args.C = q.input[1], args.D = in.d, args.H = in.h, args.W = in.w;
  args.act = Act::relu;
  args.window.out = in;
  args.x = args.y = dense_of(q.layout, q.input);
  if (!q.pool_kernel.empty()) {
    const Sizes<int64_t> ones(q.pool_kernel.size(), 1);
    const auto output = pool_output_size(max_pool_name(2), q.input, q.pool_kernel, q.pool_stride,
                                         q.pool_padding, ones, false);
    args.window = window_of(output, q.pool_kernel, q.pool_stride, q.pool_padding, ones);
    args.offsets = args.y = dense_of(q.layout, output);
    args.offset = offset_type(args.window.kernel.cells());
  }
  return {explain_table("forward", t.norm_act_pool, args),
          explain_table("backward", t.norm_act_pool_backward, {args, args.y, args.x})};
}

std::vector<Explanation> explain_linear(const Question& q) {
  const Tables& t = tables(q.device);
  const auto output = linear_output_size(q.input, q.weight);
  LinearArgs args = common<LinearArgs>(q);
  args.tf32 = allows_tf32(q.device, Layer::linear);
  args.M = 1;
  for (size_t i = 0; i + 1 < output.size(); ++i) args.M *= output[i];
  args.N = q.weight[0], args.K = q.weight[1];
  args.x = {nullptr, args.K, 1}, args.w = {nullptr, args.K, 1}, args.y = {nullptr, args.N, 1};
  LinearActBackwardArgs backward{args, args.y, args.x, args.w};
  backward.linear.epilogue.act = Act::relu;
  return {explain_table("fprop", t.linear_fprop, args), explain_table("dgrad", t.linear_dgrad, args),
          explain_table("wgrad", t.linear_wgrad, args),
          explain_table("backward", t.linear_act_backward, backward)};
}

std::vector<Explanation> explain_chain(const Question& q) {
  const Tables& t = tables(q.device);
  const auto plan = read_plan(q.plan.data(), q.plan.size(), q.params.size());
  const auto sizes = chain_sizes(plan, q.input, q.params, dtype_size(q.dtype));
  const auto common_args = common<ChainArgs>(q);
  ChainBackwardArgs backward;
  ChainArgs& args = backward.chain = chain_args(plan, sizes, q.dtype, common_args.target);
  args.layout = args.inner = q.layout;
  const View placeholder = dense(Layout::contiguous, 1, 1, 1, 1);
  for (ChainStage& stage : args.stages) {
    stage.conv.tf32 = allows_tf32(q.device, stage.layer);
    stage.conv.w = stage.grad_w = placeholder;
  }
  args.x = args.y = backward.grad_y = backward.grad_x = placeholder;
  args.saved = placeholder.data;
  backward.forward = choose(t.chain, args).name;
  Explanation explained = explain_table("backward", t.chain_backward, backward);
  args.saved = nullptr;  // forward alone, for inference
  return {explain_table("forward", t.chain, args), explained};
}

}  // namespace

std::vector<RowInfo> list_rows() {
  std::vector<RowInfo> all;
  for (const Device device : {Device::cpu, Device::cuda})
    tables(device).each([&](const char* op, const char* pass, const auto& table) {
      for (const auto& row : table) {
        RowInfo info{row.name, row.file, source_hash(row.file), op, pass, device_name(device),
                     {},       {},       row.launch != nullptr};
        for (const Dtype t : {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16})
          if (row.dtypes & dtype_bit(t)) info.dtypes.push_back(dtype_name(t));
        for (const Layout l : {Layout::contiguous, Layout::channels_last, Layout::strided})
          if (row.layouts & layout_bit(l)) info.layouts.push_back(layout_name(l));
        all.push_back(info);
      }
    });
  return all;
}

std::vector<Explanation> explain(const Question& q) {
  const size_t axes = q.pool_kernel.size();
  if (q.op == "conv" || q.op == "conv_act_pool") return explain_conv(q);
  if (q.op == "max_pool")
    return explain_pool(q, max_pool_name(axes), &Tables::max_pool, &Tables::max_pool_backward);
  if (q.op == "avg_pool")
    return explain_pool(q, avg_pool_name(axes), &Tables::avg_pool, &Tables::avg_pool_backward);
  if (q.op == "norm_act_pool") return explain_norm(q);
  if (q.op == "chain") return explain_chain(q);
  FASTCONV_CHECK(
      q.op == "linear",
      "explain: op must be conv, conv_act_pool, max_pool, avg_pool, norm_act_pool, linear or chain, got ",
      q.op);
  return explain_linear(q);
}

}  // namespace fastconv

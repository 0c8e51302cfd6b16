// SPDX-License-Identifier: MIT
#include "core/chain.h"

namespace fastconv {

namespace {

// Reads a plan from its front.
class Reader {
 public:
  Reader(const int64_t* plan, size_t size) : at_(plan), end_(plan + size) {}
  bool done() const { return at_ == end_; }
  int64_t next() {
    FASTCONV_CHECK(!done(), "chain: plan ends within a stage");
    return *at_++;
  }
  int64_t next_below(int64_t limit, const char* name) {
    const int64_t value = next();
    FASTCONV_CHECK(value >= 0 && value < limit, "chain: ", name, " of a stage must be at least 0 and below ",
                   limit, ", got ", value);
    return value;
  }
  Sizes<int64_t> next_values(size_t count) {
    Sizes<int64_t> values(count);
    for (int64_t& value : values) value = next();
    return values;
  }

 private:
  const int64_t *at_, *end_;
};

PlanStage read_stage(Reader& reader) {
  PlanStage s;
  s.layer = static_cast<Layer>(reader.next_below(2, "kind"));
  s.act = static_cast<Act>(reader.next_below(2, "act"));
  s.bias = reader.next_below(2, "bias") != 0;
  if (s.layer == Layer::linear) return s;
  s.stride = reader.next_values(2);
  s.padding = reader.next_values(4);
  s.dilation = reader.next_values(2);
  s.groups = reader.next();
  s.pool_kernel = reader.next_values(2);
  s.pool_stride = reader.next_values(2);
  s.pool_padding = reader.next_values(2);
  const Sizes<int64_t> zeros{0, 0}, ones{1, 1};
  const bool one_cell = s.pool_kernel == ones && s.pool_stride == ones;
  if (s.pool_kernel == zeros || one_cell) s.pool_kernel = s.pool_stride = s.pool_padding = {};
  return s;
}

Extent3 extent2(const Sizes<int64_t>& values, int64_t missing = 1) { return {missing, values[0], values[1]}; }

ConvArgs conv_of(const PlanStage& plan, const StageSizes<int64_t>& sizes) {
  ConvArgs conv;
  ConvShape& s = conv.shape;
  s.N = sizes.input[0], s.C = sizes.input[1];
  s.K = sizes.output[1];
  conv.epilogue.act = plan.act;
  if (plan.layer == Layer::linear) return conv;
  s.H = sizes.input[2], s.W = sizes.input[3];
  s.R = sizes.weight[2], s.S = sizes.weight[3];
  s.P = sizes.filtered[2], s.Q = sizes.filtered[3];
  s.groups = plan.groups;
  s.stride = extent2(plan.stride), s.dilation = extent2(plan.dilation), s.padding = extent2(plan.padding, 0);
  if (!plan.pool_kernel.empty()) {
    const Sizes<int64_t> pooled(sizes.output.begin() + 2, sizes.output.end());
    conv.epilogue.pool = {extent2(plan.pool_kernel), extent2(plan.pool_stride), extent2(plan.pool_padding, 0),
                          Extent3{}, extent2(pooled)};
  }
  return conv;
}

}  // namespace

std::vector<PlanStage> read_plan(const int64_t* plan, size_t size, size_t params) {
  std::vector<PlanStage> stages;
  size_t needed = 0;
  for (Reader reader(plan, size); !reader.done();) {
    stages.push_back(read_stage(reader));
    needed += stages.back().bias ? 2 : 1;
    FASTCONV_CHECK(stages.size() == 1 || stages.back().layer == Layer::linear ||
                       stages[stages.size() - 2].layer == Layer::conv,
                   "chain: a convolution cannot follow a linear layer");
  }
  FASTCONV_CHECK(!stages.empty() && stages.size() <= kMostStages, "chain: plan must have 1 to ", kMostStages,
                 " stages, got ", stages.size());
  FASTCONV_CHECK(needed == params, "chain: plan needs ", needed, " parameters, got ", params);
  return stages;
}

ChainArgs chain_args(const std::vector<PlanStage>& plan, const ChainSizes<int64_t>& sizes, Dtype dtype,
                     const Target& target) {
  ChainArgs args;
  args.dtype = dtype, args.target = target;
  args.count = static_cast<int64_t>(plan.size());
  int64_t saved = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    ChainStage& s = args.stages[i];
    s.layer = plan[i].layer;
    s.conv = conv_of(plan[i], sizes.stages[i]);
    s.conv.dtype = dtype, s.conv.target = target;
    ConvShape& shape = s.conv.shape;
    // What flows into a linear layer, image by image, is its filter's extent.
    if (s.layer == Layer::linear && i > 0 && plan[i - 1].layer == Layer::conv) {
      const Sizes<int64_t>& before = sizes.stages[i - 1].output;
      shape.C = before[1], shape.H = before[2], shape.W = before[3];
    }
    if (s.layer == Layer::linear) shape.R = shape.H, shape.S = shape.W;
    s.padded_h = shape.H, s.padded_w = shape.W;
    if (s.layer == Layer::conv) {
      const Sizes<int64_t>& p = plan[i].padding;
      s.padded_h += p[0] + p[2], s.padded_w += p[1] + p[3];
    }
    if (sizes.stages[i].output_bytes) s.saved_output = saved;
    saved += sizes.stages[i].output_bytes;
  }
  for (int64_t i = 0; i < args.count; ++i) {  // bytes last: numbers stay aligned
    if (sizes.stages[i].offset_bytes) args.stages[i].saved_offsets = saved;
    saved += sizes.stages[i].offset_bytes;
  }
  return args;
}

}  // namespace fastconv

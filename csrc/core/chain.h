// SPDX-License-Identifier: MIT
// A chain of stages: how a plan is read, which sizes follow from it, and what `saved` holds.
//
// A plan lists the stages one after the other, each as a run of integers:
//
//   convolution   0, act, bias, stride h w, padding top left bottom right, dilation h w, groups,
//                 pool: kernel h w (0 0: none), stride h w, padding h w
//   linear        1, act, bias
//
// act is 0 (none) or 1 (ReLU), bias whether the stage has one. Parameters are the weights in order, each
// followed by its bias.
#pragma once

#include <utility>

#include "core/chain_args.h"
#include "core/shape.h"

namespace fastconv {

struct PlanStage {
  Layer layer = Layer::conv;
  Act act = Act::none;
  bool bias = false;
  Sizes<int64_t> stride, padding, dilation;
  int64_t groups = 1;
  Sizes<int64_t> pool_kernel, pool_stride, pool_padding;  // empty: no pool
};

// Fails on what is no plan, and where it has not as many parameters as `params`.
std::vector<PlanStage> read_plan(const int64_t* plan, size_t size, size_t params);

template <class Int>
struct StageSizes {
  Sizes<Int> input, weight, filtered, output;  // filtered: before the pool
  // Bytes in `saved`; zero: not kept.
  Int output_bytes{0}, offset_bytes{0};
};

template <class Int>
struct ChainSizes {
  std::vector<StageSizes<Int>> stages;
  Int saved_bytes{0};

  const Sizes<Int>& output() const { return stages.back().output; }
};

template <class Int>
Sizes<Int> sizes_as(const Sizes<int64_t>& values) {
  return {values.begin(), values.end()};
}

// Vectors of a pixel in lanes (cpu/lanes.inl); `saved` has room for them.
template <class Int>
Int lanes_pitch(const Int& channels) {
  return channels + 1 - channels % 2;
}

// Sizes of all stages. Fails where a stage cannot follow the one before.
template <class Int>
ChainSizes<Int> chain_sizes(const std::vector<PlanStage>& plan, const Sizes<Int>& input,
                            const std::vector<Sizes<Int>>& params, int64_t element_bytes) {
  const char* op = "chain";
  ChainSizes<Int> sizes;
  Sizes<Int> x = input;
  auto param = params.begin();
  for (const PlanStage& stage : plan) {
    StageSizes<Int> s;
    const Sizes<Int>& weight = s.weight = *param++;
    if (stage.layer == Layer::conv) {
      FASTCONV_CHECK(x.size() == 4, op,
                     ": a convolution needs an input of 4 dimensions [N, C, H, W], got size ", text(x));
      s.filtered = conv_output_size(x, weight, sizes_as<Int>(stage.stride), sizes_as<Int>(stage.padding),
                                    sizes_as<Int>(stage.dilation), Int(stage.groups));
      s.output = s.filtered;
      if (!stage.pool_kernel.empty())
        s.output = pool_output_size(max_pool_name(2), s.filtered, sizes_as<Int>(stage.pool_kernel),
                                    sizes_as<Int>(stage.pool_stride), sizes_as<Int>(stage.pool_padding),
                                    Sizes<Int>(2, Int(1)), false);
    } else {
      if (x.size() == 4 && !sizes.stages.empty())
        x = {x[0], mul_add(mul_add(x[1], x[2], Int(0), op), x[3], Int(0), op)};
      FASTCONV_CHECK(x.size() == 2, op, ": a linear layer in front needs an input of 2 dimensions, got size ",
                     text(x));
      s.output = s.filtered = linear_output_size(x, weight);
    }
    if (stage.bias) require_bias(*param++, s.output[1], op);
    s.input = std::exchange(x, s.output);
    sizes.stages.push_back(s);
  }
  // The outputs between stages and the offsets are kept with the padding that the next stage has around them.
  const Int units = (input[0] + (kSavedUnit - 1)) / kSavedUnit;
  for (size_t i = 0; i < plan.size(); ++i) {
    StageSizes<Int>& s = sizes.stages[i];
    const Int pixel = units * kSavedUnit * lanes_pitch(s.output[1]);
    Int height(1), width(1);
    if (plan[i].layer == Layer::conv) height = s.output[2], width = s.output[3];
    if (i + 1 < plan.size()) {
      if (plan[i + 1].layer == Layer::conv) {
        const Sizes<int64_t>& p = plan[i + 1].padding;
        height = height + (p[0] + p[2]), width = width + (p[1] + p[3]);
      }
      require_countable(Sizes<Int>{pixel, height, width}, op);
      s.output_bytes = pixel * height * width * element_bytes;
    }
    if (!plan[i].pool_kernel.empty()) {
      int64_t cells = 1;
      for (const int64_t k : plan[i].pool_kernel) cells *= k;
      s.offset_bytes = pixel * height * width * (offset_type(cells) == Offset::u8 ? 1 : 4);
    }
    sizes.saved_bytes = sizes.saved_bytes + s.output_bytes + s.offset_bytes;
  }
  return sizes;
}

// The stages as kernels see them, without tensors and without TF32.
ChainArgs chain_args(const std::vector<PlanStage>& plan, const ChainSizes<int64_t>& sizes, Dtype dtype,
                     const Target& target);

}  // namespace fastconv

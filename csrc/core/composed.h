// SPDX-License-Identifier: MIT
// The last row of each fused table: the same work done by the best unfused rows of that device, through
// workspace. It makes a fused operator complete on every shape that its parts take.
#pragma once

#include "core/table.h"

namespace fastconv::composed {

double conv_act_pool_cost(const ConvArgs& a);
int64_t conv_act_pool_workspace(const ConvArgs& a);
void conv_act_pool(const ConvArgs& a, void* workspace, void* stream);

double conv_act_pool_backward_cost(const ConvActPoolBackwardArgs& a);
int64_t conv_act_pool_backward_workspace(const ConvActPoolBackwardArgs& a);
void conv_act_pool_backward(const ConvActPoolBackwardArgs& a, void* workspace, void* stream);

double linear_act_backward_cost(const LinearActBackwardArgs& a);
int64_t linear_act_backward_workspace(const LinearActBackwardArgs& a);
void linear_act_backward(const LinearActBackwardArgs& a, void* workspace, void* stream);

}  // namespace fastconv::composed

// SPDX-License-Identifier: MIT
// The emulator's own test: legal code that must stay silent and give the right values, and its broken twins,
// each with a part of the sentence that must be found.
#pragma once

#include "cases.h"

namespace fastconv::simt {

// Launches blocks on an output of `count` elements.
template <class T, class... Params, class... Args>
void on_output(void (*kernel)(T*, Params...), Grid grid, int block, int count, const Args&... args) {
  Global<T> out(count);
  launch(kernel, grid, dim3(block), 0, nullptr, static_cast<T*>(out), args...);
}
template <class T, class... Params, class... Args>
void on_output(void (*kernel)(T*, Params...), int block, int count, const Args&... args) {
  on_output(kernel, Grid(), block, count, args...);
}

// One block, with an input of as many floats.
template <class... Params, class... Args>
void on_input(void (*kernel)(float*, const float*, Params...), int block, int count, const Args&... args) {
  Global<float> in(count, "in", Access::input), out(count, "out", Access::output);
  launch(kernel, dim3(1), dim3(block), 0, nullptr, static_cast<float*>(out), static_cast<const float*>(in),
         args...);
}

}  // namespace fastconv::simt

// SPDX-License-Identifier: MIT
// The short way for calls from Python that have nothing unusual about them.
#pragma once

#include <torch/csrc/python_headers.h>

namespace fastconv {

// Adds eager_chain, eager_conv, eager_linear and eager_max_pool to the extension module.
void define_eager(PyObject* module);

}  // namespace fastconv

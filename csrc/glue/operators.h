// SPDX-License-Identifier: MIT
// The operators `fastconv::*` by their names; csrc/bindings.cpp has their schemas.
#pragma once

#include <string>

#include <ATen/core/dispatch/Dispatcher.h>

namespace fastconv {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("fastconv::") + name).c_str(), "")
      .typed<Signature>();
}

}  // namespace fastconv

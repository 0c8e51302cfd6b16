// SPDX-License-Identifier: MIT
// Errors are sentences: `fail("conv2d: groups must be positive, got ", groups)`. Python sees a RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastconv {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw Error(sentence.str());
}

}  // namespace fastconv

// Fails with the sentence made of the further arguments, which are evaluated only then.
#define FASTCONV_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::fastconv::fail(__VA_ARGS__); \
  } while (false)

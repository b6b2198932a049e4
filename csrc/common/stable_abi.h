// torch's stable ABI, with two things mended: what errors say, and what a `str` argument leaves behind.
//
// torch's macros print the source text of the call that failed, and the path of its file on the machine that built the
// package. Here they print the message alone, also in the inline functions of torch's headers.
#pragma once

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace seqaccel {

template <typename... Args>
[[noreturn]] void fail(const Args&... text) {
  std::ostringstream message;
  ((message << text), ...);
  throw std::runtime_error(message.str());
}

// A call of torch's C interface failed. torch 2.13 and later say why.
[[noreturn]] inline void fail_in_torch() {
  using Message = const char* (*)();
  static const auto message =
      reinterpret_cast<Message>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* const text = message ? message() : nullptr;
  fail(text && *text ? text : "seqaccel: a call of torch's failed, perhaps for lack of memory");
}

}  // namespace seqaccel

#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...)    \
  if (__builtin_expect(!(condition), 0)) { \
    seqaccel::fail(__VA_ARGS__);           \
  }

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    seqaccel::fail_in_torch();       \
  }

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace seqaccel {

// A `str` argument of an operator. torch's conversion to std::string loses a string at every call; this one frees it.
struct Text {
  std::string value;
};

}  // namespace seqaccel

namespace torch::stable::detail {

template <>
struct ToImpl<seqaccel::Text> {
  static seqaccel::Text call(StableIValue stacked, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(stacked);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    seqaccel::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail

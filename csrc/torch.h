// All that the ops take from PyTorch: its stable ABI, so that one build serves every release from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

namespace mekd {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The dtype of a C++ type.
template <typename A>
constexpr ScalarType kType = torch::headeronly::CppTypeToScalarType<A>::value;

inline std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  return out << ']';
}

template <typename... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Python's ValueError: pybind11 makes it of this exception.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument(words(parts...));
}

#define MEKD_CHECK(condition, ...) \
  if (!(condition)) fail(__VA_ARGS__)

inline int64_t item_size(ScalarType type) {
  return static_cast<int64_t>(aoti_torch_dtype_element_size(
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))));
}

// Fresh memory on the CPU. Through the dispatcher, where PyTorch can be told to fill it.
inline Tensor empty(Sizes sizes, ScalarType type, std::optional<MemoryFormat> format = std::nullopt) {
  return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt, format);
}

inline Tensor as_dtype(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The one number of a tensor.
inline double number(const Tensor& x) {
  double value;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_float64(x.get(), &value));
  return value;
}

} // namespace
} // namespace mekd

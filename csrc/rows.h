// What the ops over rows of logits share: rows of any layout, one loss a row, row weights and mask, scale and
// reduction, and errors found while the values are read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "vec.h"

namespace mekd {
namespace {

using at::Tensor;
using Result = std::tuple<Tensor, Tensor>;

// (..., C) as rows with unit stride inside; copied only where the strides do not allow it.
inline Tensor as_rows(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, "expected shape (..., C) with at least one class, got ", x.sizes());
  Tensor rows = x.dim() == 2 ? x : x.reshape({x.numel() / x.size(-1), x.size(-1)});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

// Rows of a tensor, read as A, n elements at a time and padded to whole vectors with -inf, which softmax ignores.
template <typename A>
struct Rows {
  Tensor tensor;
  const char* data;
  int64_t stride; // in bytes: offsets are 64 bits wide before they are multiplied
  int64_t item;
  bool direct; // no conversion: read where they are
  Load<A> load;

  explicit Rows(const Tensor& x)
      : tensor(as_rows(x)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        stride(tensor.stride(0) * tensor.element_size()),
        item(tensor.element_size()),
        direct(tensor.scalar_type() == c10::CppTypeToScalarType<A>::value),
        load(loader<A>(tensor.scalar_type())) {}

  const char* at(int64_t row, int64_t begin = 0) const { return data + row * stride + begin * item; }

  // Where the n elements of a row from begin on are: in memory, or in the buffer.
  const A* operator()(int64_t row, int64_t begin, int64_t n, A* buffer) const {
    const char* from = at(row, begin);
    if (direct && n % kWidth<A> == 0) return reinterpret_cast<const A*>(from);
    load(from, buffer, n);
    for (int64_t j = n; j % kWidth<A>; ++j) buffer[j] = -kInf<A>;
    return buffer;
  }

  const A* unpadded(int64_t row, int64_t begin, int64_t n, A* buffer) const {
    if (!direct) load(at(row, begin), buffer, n);
    return direct ? reinterpret_cast<const A*>(at(row, begin)) : buffer;
  }
};

// The first bad value that any thread came upon.
struct Fault {
  std::atomic<bool> found{false};
  int64_t row = 0;
  double value = 0;

  void report(int64_t at, double what) {
    if (!found.exchange(true)) {
      row = at;
      value = what;
    }
  }
};

// What is wrong with a teacher's probabilities, as they are read: below 0, or with a sum that no rounding explains.
struct Probabilities {
  double slack; // how far from 1 a sum may be
  Fault negative, off;

  void look_at(int64_t row, double lowest) {
    if (lowest < 0) negative.report(row, lowest);
  }

  void refuse(std::string_view name, std::string_view allowed) const {
    TORCH_CHECK_VALUE(
        !negative.found, name, " hold ", negative.value, " in row ", negative.row, "; probabilities are at least 0");
    TORCH_CHECK_VALUE(!off.found, name, " sum to ", off.value, " in row ", off.row, "; ", allowed);
  }

  std::string whole(std::string_view most, std::string_view advice) const {
    return c10::str("a row of probabilities sums to 1", most, ", give or take ", slack, "; ", advice);
  }
};

constexpr std::string_view kSayFloor = "for rounded ones say floor, half their step";

inline double positive(const Tensor& tau) {
  const double value = tau.item<double>();
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), "tau is ", value, "; it must be above 0 and finite");
  return value;
}

// What the losses of rows, and their gradients, are multiplied with before they are returned or added up.
struct Factors {
  double factor = 1; // of every row
  bool none = false; // reduction "none": a loss for each row
  std::vector<double> weights;
  Tensor mask;

  // A row that does not count, or for nothing, may hold anything.
  bool skips(int64_t row) const {
    return (mask.defined() && !mask.const_data_ptr<bool>()[row]) || (!weights.empty() && weights[row] == 0);
  }
  double of(int64_t row) const { return weights.empty() ? factor : factor * weights[row]; }
};

inline double scale_factor(std::string_view scale, double tau) {
  return scale == "tau2" ? tau * tau : scale == "tau" ? tau : 1.0;
}

// "mean" divides by all elements, "batchmean" by dimension 0, "rowmean" by the rows that count.
inline Factors factors_of(
    const Tensor& student, double scale, std::string_view reduction, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& mask) {
  const int64_t classes = student.size(-1), rows = student.numel() / classes;
  Factors factors;
  if (weights.has_value()) {
    TORCH_CHECK_VALUE(weights->numel() == rows, "weights have shape ", weights->sizes(), "; there are ", rows, " rows");
    const Tensor flat = weights->to(at::kDouble).contiguous();
    factors.weights.assign(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + rows);
  }
  int64_t kept = rows;
  if (mask.has_value()) {
    TORCH_CHECK_VALUE(
        mask->numel() == rows && mask->scalar_type() == at::kBool, "mask has shape ", mask->sizes(), " and dtype ",
        mask->scalar_type(), "; it must be bool with one element for each of ", rows, " rows");
    factors.mask = mask->contiguous();
    const bool* on = factors.mask.const_data_ptr<bool>();
    kept = std::count(on, on + rows, true);
  }
  factors.none = reduction == "none";
  const int64_t divisor = reduction == "mean" ? student.numel()
      : reduction == "batchmean"              ? student.size(0)
      : reduction == "rowmean"                ? kept
                                              : 1;
  factors.factor = scale / std::max<int64_t>(divisor, 1);
  return factors;
}

// float16 is too narrow for gradients that a GradScaler has not scaled yet: those stay float32 until backward.
inline at::ScalarType grad_dtype(const Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

inline at::ScalarType loss_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor scalar(double value, const at::TensorOptions& options) {
  Tensor result = at::empty({}, options);
  if (result.scalar_type() == at::kDouble) {
    *result.mutable_data_ptr<double>() = value;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return result;
}

// Fresh memory of this size comes from the system at every call, page by page; asked for in huge pages, its first
// touch costs a fifth of that. A wish only: where it is not granted, nothing changes.
constexpr int64_t kLarge = 32 << 20; // bytes; what is smaller, malloc keeps and gives again
constexpr uintptr_t kHugePage = 2 << 20;

inline const Tensor& in_huge_pages(const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  if (static_cast<int64_t>(fresh.nbytes()) >= kLarge) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()), end = at + fresh.nbytes();
    const uintptr_t first = (at + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

inline Tensor empty_grad(const Tensor& like, bool wanted) {
  const auto options = like.options().dtype(grad_dtype(like));
  return wanted ? in_huge_pages(at::empty(like.sizes(), options)) : at::empty({0}, options);
}

// Class labels, one for each row, and which rows count: those that neither the mask nor ignore_index leaves out.
struct Labels {
  Tensor flat;
  Tensor kept;
  const int64_t* values;

  Labels(const Tensor& labels, int64_t rows, int64_t classes, int64_t ignore_index, const std::optional<Tensor>& mask)
      : flat(labels.contiguous()), kept(at::empty(labels.sizes(), labels.options().dtype(at::kBool))) {
    TORCH_CHECK_VALUE(
        labels.numel() == rows && labels.scalar_type() == at::kLong, "labels have shape ", labels.sizes(), " and dtype ",
        labels.scalar_type(), "; they must be int64 with one element for each of ", rows, " rows");
    TORCH_CHECK_VALUE(!mask.has_value() || mask->numel() == rows, "mask has shape ", mask->sizes());
    values = flat.const_data_ptr<int64_t>();
    const Tensor on = mask.has_value() ? mask->contiguous() : Tensor();
    bool* const to = kept.mutable_data_ptr<bool>();
    for (int64_t i = 0; i < rows; ++i) {
      to[i] = values[i] != ignore_index && (!on.defined() || on.const_data_ptr<bool>()[i]);
      TORCH_CHECK_VALUE(
          !to[i] || (values[i] >= 0 && values[i] < classes), "labels hold ", values[i], " in row ", i,
          "; classes are 0 to ", classes - 1);
    }
  }

  int64_t operator[](int64_t row) const { return values[row]; }
};

// The gradient's rows: A where that is its dtype, rounded once where it is not.
template <typename A>
struct Output {
  int64_t item;
  bool same;
  Store<A> store;

  explicit Output(at::ScalarType type)
      : item(c10::elementSize(type)), same(type == c10::CppTypeToScalarType<A>::value), store(storer<A>(type)) {}

  bool direct(int64_t n) const { return same && n % kWidth<A> == 0; }
};

// Scratch of a thread: two rows of A, and what each block of them is referred to.
template <typename A>
struct Scratch {
  std::vector<A> memory;
  std::vector<A> values; // of a top-k answer
  A *s, *t;             // the student's and the target's exponentials
  A *top_s, *top_t; // by block

  explicit Scratch(int64_t classes) : memory(2 * padded<A>(classes) + 2 * (classes / kBlock + 1)) {
    s = memory.data();
    t = s + padded<A>(classes);
    top_s = t + padded<A>(classes);
    top_t = top_s + classes / kBlock + 1;
  }
};

// Calls body(begin, end, losses, gradient or nullptr, output) on slices of the rows that begin at multiples of step, and
// reduces the losses.
template <typename A, typename Body>
Result for_losses(const Tensor& student, const Factors& factors, bool grad, int64_t step, Body body) {
  const int64_t classes = student.size(-1), rows = student.numel() / classes;
  Tensor gradient = empty_grad(student, grad);
  const auto options = student.options().dtype(c10::CppTypeToScalarType<A>::value);
  Tensor losses = at::empty(factors.none ? student.sizes().slice(0, student.dim() - 1) : at::IntArrayRef(rows), options);
  A* const loss = losses.mutable_data_ptr<A>();
  char* const to = grad ? static_cast<char*>(gradient.mutable_data_ptr()) : nullptr;
  const Output<A> output(grad_dtype(student));
  const int64_t steps = (rows + step - 1) / step;
  at::parallel_for(0, steps, std::max<int64_t>(1, 32768 / (classes * step)), [&](int64_t begin, int64_t end) {
    body(begin * step, std::min(rows, end * step), loss, to, output);
  });
  const auto type = loss_dtype(student);
  if (factors.none) return {losses.to(type), gradient};
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += loss[i];
  return {scalar(total, options.dtype(type)), gradient};
}

// Calls row(i, scratch, factor, gradient or nullptr) -> loss before its factor, for every row that counts, and reduces.
template <typename A, typename Row>
Result for_rows(const Tensor& student, const Factors& factors, bool grad, Row row) {
  const int64_t classes = student.size(-1);
  return for_losses<A>(student, factors, grad, 1, [&](int64_t begin, int64_t end, A* loss, char* to, const Output<A>& output) {
    Scratch<A> scratch(classes);
    const int64_t step = classes * output.item;
    for (int64_t i = begin; i < end; ++i) {
      char* const here = to ? to + i * step : nullptr;
      if (factors.skips(i)) {
        loss[i] = 0;
        if (here) std::memset(here, 0, step);
        continue;
      }
      const double factor = factors.of(i);
      loss[i] = static_cast<A>(factor * row(i, scratch, factor, here));
    }
  });
}

// Float for what is narrower than double on both sides.
template <typename Body>
auto for_dtype(const Tensor& student, const Tensor& target, Body body) {
  const bool wide = student.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble;
  return wide ? body(double{}) : body(float{});
}

} // namespace
} // namespace mekd

// What the ops over rows of logits share: rows of any layout, one loss a row, row weights and mask, scale and
// reduction, and errors found while the values are read.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "torch.h"
#include "vec.h"

namespace mekd {
namespace {

using Result = std::tuple<Tensor, Tensor>;

template <typename A>
Load<A> loader(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return load<double, A>;
    case ScalarType::Float: return load<float, A>;
    case ScalarType::BFloat16: return load<c10::BFloat16, A>;
    case ScalarType::Half: return load<c10::Half, A>;
    default: fail("dtype ", type, " is not supported; use float64, float32, bfloat16 or float16");
  }
}

template <typename A>
Store<A> storer(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return store<double, A>;
    case ScalarType::Float: return store<float, A>;
    case ScalarType::BFloat16: return store<c10::BFloat16, A>;
    case ScalarType::Half: return store<c10::Half, A>;
    default: fail("dtype ", type, " is not supported; use float64, float32, bfloat16 or float16");
  }
}

// (..., C) as rows with unit stride inside; copied only where the strides do not allow it.
inline Tensor as_rows(const Tensor& x) {
  MEKD_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "expected shape (..., C) with at least one class, got ", x.sizes());
  Tensor rows = x.dim() == 2 ? x : torch::stable::reshape(x, {x.numel() / x.size(-1), x.size(-1)});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// Rows of a tensor, read as A, n elements at a time.
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
        direct(tensor.scalar_type() == kType<A>),
        load(loader<A>(tensor.scalar_type())) {}

  const char* at(int64_t row, int64_t begin = 0) const { return data + row * stride + begin * item; }

  // Where the n elements of a row from begin on are: in memory, or in the buffer.
  const A* operator()(int64_t row, int64_t begin, int64_t n, A* buffer) const {
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
    MEKD_CHECK(
        !negative.found, name, " hold ", negative.value, " in row ", negative.row, "; probabilities are at least 0");
    MEKD_CHECK(!off.found, name, " sum to ", off.value, " in row ", off.row, "; ", allowed);
  }

  std::string whole(std::string_view most, std::string_view advice) const {
    return words("a row of probabilities sums to 1", most, ", give or take ", slack, "; ", advice);
  }
};

constexpr std::string_view kSayFloor = "for rounded ones say floor, half their step";

inline double positive(const Tensor& tau) {
  const double value = number(tau);
  MEKD_CHECK(value > 0 && std::isfinite(value), "tau is ", value, "; it must be above 0 and finite");
  return value;
}

// Which rows count, one byte each; without any all do.
using Kept = std::vector<uint8_t>;

inline Kept kept_rows(const std::optional<Tensor>& mask, int64_t rows) {
  if (!mask.has_value()) return {};
  MEKD_CHECK(
      mask->numel() == rows && mask->scalar_type() == ScalarType::Bool, "mask has shape ", mask->sizes(), " and dtype ",
      mask->scalar_type(), "; it must be bool with one element for each of ", rows, " rows");
  const Tensor flat = dense(*mask);
  const bool* const on = flat.const_data_ptr<bool>();
  return {on, on + rows};
}

// What the losses of rows, and their gradients, are multiplied with before they are returned or added up.
struct Factors {
  double factor = 1; // of every row
  bool none = false; // reduction "none": a loss for each row
  std::vector<double> weights;
  Kept kept;

  // A row that does not count, or for nothing, may hold anything.
  bool skips(int64_t row) const {
    return (!kept.empty() && !kept[row]) || (!weights.empty() && weights[row] == 0);
  }
  double of(int64_t row) const { return weights.empty() ? factor : factor * weights[row]; }
};

inline double scale_factor(std::string_view scale, double tau) {
  return scale == "tau2" ? tau * tau : scale == "tau" ? tau : 1.0;
}

// "mean" divides by all elements, "batchmean" by dimension 0, "rowmean" by the rows that count.
inline Factors factors_of(
    const Tensor& student, double scale, std::string_view reduction, const std::optional<Tensor>& weights, Kept kept) {
  const int64_t classes = student.size(-1), rows = student.numel() / classes;
  Factors factors;
  if (weights.has_value()) {
    MEKD_CHECK(weights->numel() == rows, "weights have shape ", weights->sizes(), "; there are ", rows, " rows");
    const Tensor flat = dense(as_dtype(*weights, ScalarType::Double));
    factors.weights.assign(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + rows);
  }
  factors.none = reduction == "none";
  const int64_t divisor = reduction == "mean" ? student.numel()
      : reduction == "batchmean"              ? student.size(0)
      : reduction != "rowmean"                ? 1
      : kept.empty()                          ? rows
                                              : std::count(kept.begin(), kept.end(), 1);
  factors.factor = scale / std::max<int64_t>(divisor, 1);
  factors.kept = std::move(kept);
  return factors;
}

// float16 is too narrow for gradients that a GradScaler has not scaled yet: those stay float32 until backward.
inline ScalarType grad_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
}

inline ScalarType loss_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor scalar(double value, ScalarType type) {
  Tensor result = empty(Sizes(), type);
  if (result.scalar_type() == ScalarType::Double) {
    *result.mutable_data_ptr<double>() = value;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return result;
}

// Fresh memory of this size may come from the system, page by page; asked for in huge pages, its first touch costs a
// fifth of that, and using it again misses fewer of its addresses. A wish only: where it is not granted, nothing changes.
constexpr int64_t kLarge = 4 << 20; // bytes
constexpr uintptr_t kHugePage = 2 << 20;

inline const Tensor& in_huge_pages(const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  if (fresh.numel() * int64_t(fresh.element_size()) >= kLarge) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()), end = at + fresh.numel() * fresh.element_size();
    const uintptr_t first = (at + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

inline Tensor empty_grad(const Tensor& like, bool wanted) {
  const ScalarType type = grad_dtype(like);
  return wanted ? in_huge_pages(empty(like.sizes(), type)) : empty({0}, type);
}

// Class labels, one for each row, and which rows count: those that neither the mask nor ignore_index leaves out.
struct Labels {
  Tensor flat;
  Kept kept;
  const int64_t* values;

  Labels(const Tensor& labels, int64_t rows, int64_t ignore_index, const std::optional<Tensor>& mask)
      : flat(dense(labels)), kept(kept_rows(mask, rows)) {
    MEKD_CHECK(
        labels.numel() == rows && labels.scalar_type() == ScalarType::Long, "labels have shape ", labels.sizes(),
        " and dtype ", labels.scalar_type(), "; they must be int64 with one element for each of ", rows, " rows");
    kept.resize(rows, 1);
    values = flat.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows; ++i) kept[i] &= values[i] != ignore_index;
  }

  // A row of weight 0 counts, but for nothing: its label may be anything.
  void check(int64_t classes, const Factors& factors) const {
    for (size_t i = 0; i < kept.size(); ++i) {
      MEKD_CHECK(
          (values[i] >= 0 && values[i] < classes) || factors.skips(i), "labels hold ", values[i], " in row ", i,
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

  explicit Output(ScalarType type)
      : item(item_size(type)), same(type == kType<A>), store(storer<A>(type)) {}
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
  std::optional<Tensor> losses;
  std::vector<A> added;
  if (factors.none) {
    losses = empty(student.sizes().slice(0, student.dim() - 1), kType<A>);
  } else {
    added.resize(rows);
  }
  A* const loss = losses ? losses->mutable_data_ptr<A>() : added.data();
  char* const to = grad ? static_cast<char*>(gradient.mutable_data_ptr()) : nullptr;
  const Output<A> output(grad_dtype(student));
  const int64_t steps = (rows + step - 1) / step;
  torch::stable::parallel_for(0, steps, std::max<int64_t>(1, 32768 / (classes * step)), [&](int64_t begin, int64_t end) {
    body(begin * step, std::min(rows, end * step), loss, to, output);
  });
  const auto type = loss_dtype(student);
  if (losses) return {as_dtype(*losses, type), gradient};
  return {scalar(std::accumulate(added.begin(), added.end(), 0.0), type), gradient};
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
  const bool wide = student.scalar_type() == ScalarType::Double || target.scalar_type() == ScalarType::Double;
  return wide ? body(double{}) : body(float{});
}

} // namespace
} // namespace mekd

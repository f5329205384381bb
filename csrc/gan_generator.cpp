// (base + alpha y) softplus(-d), the generator's GAN loss and the information term, with y, the teacher's top
// probability, taken from its answer on the way.
#include "softmax.h"

namespace mekd {
namespace {

// What binary losses need of logits x, from one exponential: softplus(x) = log(1 + e^x), and the sigmoid.
template <typename A>
struct Sigmoids {
  using V = Vec<A>;
  V x, e, l, r;

  explicit Sigmoids(V logit) : x(logit), e(exp(-abs(x))), l(log1p(e)), r(V(1) / (V(1) + e)) {}
  V softplus() const { return higher(x, V(0)) + l; }
  V softplus_of_minus() const { return higher(-x, V(0)) + l; } // -log sigmoid(x)
  V sigmoid() const { return select<A>(x < V(0), e, V(1)) * r; }
  V sigmoid_of_minus() const { return select<A>(x < V(0), V(1), e) * r; }
};

// One loss and gradient for each element of d, reduced: formula(x, y, slope) -> loss, on vectors, for numbers y that
// fill(begin, n, y) sets.
template <typename A, typename Fill, typename Formula>
Result for_elements(
    const Tensor& d, std::string_view reduction, bool grad, int64_t grain, Fill fill, Formula formula) {
  using V = Vec<A>;
  const Tensor x = dense(d);
  const int64_t m = x.numel();
  const bool none = reduction == "none";
  const int64_t divisor = reduction == "mean" ? m : reduction == "batchmean" ? x.size(0) : 1;
  const double by = 1.0 / std::max<int64_t>(divisor, 1);
  Tensor gradient = empty_grad(x, grad);
  Tensor losses = empty(x.sizes(), kType<A>);
  const Load<A> load = loader<A>(x.scalar_type());
  const Output<A> output(grad_dtype(x));
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  A* const loss = losses.mutable_data_ptr<A>();
  char* const to = grad ? static_cast<char*>(gradient.mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, m, grain, [&](int64_t first, int64_t end) {
    A xs[kPart] = {}, ys[kPart] = {};
    for (int64_t begin = first; begin < end; begin += kPart) {
      const int64_t n = std::min(kPart, end - begin);
      load(from + begin * x.element_size(), xs, n);
      fill(begin, n, ys);
      for (int64_t j = 0; j < n; j += kWidth<A>) {
        V slope;
        const V value = formula(V::load(xs + j), V::load(ys + j), slope);
        value.store(loss + begin + j, std::min(kWidth<A>, n - j));
        (slope * V(static_cast<A>(by))).store(xs + j);
      }
      if (to) output.store(xs, to + begin * output.item, n);
    }
  });
  const auto type = loss_dtype(x);
  if (none) return {as_dtype(losses, type), gradient};
  double total = 0;
  for (int64_t i = 0; i < m; ++i) total += loss[i];
  return {scalar(by * total, type), gradient};
}

// The largest of a row of probabilities; a NaN shows in their sum.
template <typename A>
A highest(const Rows<A>& rows, int64_t row, int64_t classes, Probabilities& seen) {
  using V = Vec<A>;
  A buffer[kBlock];
  V high(0), low(0), total(0), high_2(0), low_2(0), total_2(0);
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    const A* const x = rows(row, begin, n, buffer);
    int64_t j = 0;
    for (; j + 2 * kWidth<A> <= n; j += 2 * kWidth<A>) { // two chains, as each waits for its last
      const V p = V::load(x + j), q = V::load(x + j + kWidth<A>);
      high = higher(p, high);
      high_2 = higher(q, high_2);
      low = lower(p, low);
      low_2 = lower(q, low_2);
      total = total + p;
      total_2 = total_2 + q;
    }
    for (; j < n; j += kWidth<A>) {
      const V p = V::load(x + j, std::min(kWidth<A>, n - j));
      high = higher(p, high);
      low = lower(p, low);
      total = total + p;
    }
  }
  const V lowest = lower(low, low_2), all_high = higher(high, high_2);
  const A least = lowest_of(lowest);
  const A all = sum(total + total_2);
  seen.look_at(row, least);
  if (std::abs(all - 1) > seen.slack) seen.off.report(row, all);
  if (std::isnan(all)) return all;
  return highest_of(all_high);
}

// The largest probability of a row of logits, 1 / sum exp(x - top).
template <typename A>
A highest_softmax(const Rows<A>& rows, int64_t row, int64_t classes) {
  using V = Vec<A>;
  alignas(64) A buffer[kBlock];
  A top = -kInf<A>;
  double z = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    const A* const x = rows(row, begin, n, buffer);
    const char* const next = rows.at(row + 1, begin);
    const Range<A> all_of = range(x, n);
    const A before = top;
    top = std::max(top, all_of.high);
    z = z == 0 ? 0 : z * std::exp(double(before) - top);
    const V of(top == -kInf<A> ? 0 : top), unit(static_cast<A>(kLog2e));
    Several<A, 4> all;
    all.fill(V(0));
    const auto pass = [&](auto near) {
      int64_t j = 0;
      for (; j + 4 * kWidth<A> <= n; j += 4 * kWidth<A>) {
        for (int64_t ahead = 0; ahead < 4 * kWidth<A>; ahead += kLine / sizeof(A)) {
          __builtin_prefetch(next + (j + ahead) * rows.item);
        }
        Several<A, 4> e;
        for (int k = 0; k < 4; ++k) e[k] = (V::load(x + j + k * kWidth<A>) - of) * unit;
        if constexpr (near) {
          e = exp2_near(e);
        } else {
          for (V& v : e) v = exp2(v);
        }
        for (int k = 0; k < 4; ++k) all[k] = all[k] + e[k];
      }
      for (; j < n; j += kWidth<A>) all[0] = all[0] + exp2((V::load(x + j, n - j, -kInf<A>) - of) * unit);
    };
    (top - all_of.low) * kLog2e < kNear ? pass(std::true_type()) : pass(std::false_type());
    z += sum((all[0] + all[1]) + (all[2] + all[3]));
  }
  return static_cast<A>(1 / z);
}

Result gan_generator(
    const Tensor& d, const std::optional<Tensor>& response, std::string_view kind, double slack, double base, double alpha,
    bool minimax, std::string_view reduction, bool grad) {
  const bool known = kind == "confidence", logits = kind == "logits";
  if (response.has_value()) {
    MEKD_CHECK(
        known ? response->numel() == d.numel() : response->dim() == 2 && response->size(0) == d.numel(), kind,
        " has shape ", response->sizes(), "; d has ", d.sizes());
  }
  return for_dtype(d, d, [&](auto type) {
    using A = decltype(type);
    using V = Vec<A>;
    std::optional<Rows<A>> rows; // none where nothing is asked of the answer
    if (response.has_value() && alpha != 0 && d.numel() > 0) {
      rows.emplace(known ? torch::stable::reshape(*response, {1, -1}) : *response);
    }
    const int64_t classes = rows && !known ? response->size(1) : 1;
    Probabilities seen{slack};
    const V least(static_cast<A>(base)), by(static_cast<A>(alpha));
    Result result = for_elements<A>(
        d, reduction, grad, std::max<int64_t>(1, 32768 / classes),
        [&](int64_t begin, int64_t n, A* y) {
          if (!rows) {
            std::fill_n(y, n, A(1));
          } else if (known) {
            rows->load(rows->at(0, begin), y, n);
            for (int64_t j = 0; j < n; ++j) {
              if (y[j] < 0 || y[j] > 1 + slack) seen.off.report(begin + j, y[j]);
            }
          } else {
            for (int64_t j = 0; j < n; ++j) {
              y[j] = logits ? highest_softmax<A>(*rows, begin + j, classes)
                            : highest<A>(*rows, begin + j, classes, seen);
            }
          }
        },
        [&](V x, V y, V& slope) {
          const Sigmoids<A> of(x);
          const V weight = by * y;
          if (minimax) {
            slope = -(least * of.sigmoid() + weight * of.sigmoid_of_minus());
            return weight * of.softplus_of_minus() - least * of.softplus();
          }
          slope = -((least + weight) * of.sigmoid_of_minus());
          return (least + weight) * of.softplus_of_minus();
        });
    MEKD_CHECK(
        !known || !seen.off.found, "confidence holds ", seen.off.value, " for sample ", seen.off.row,
        "; a probability lies between 0 and 1");
    seen.refuse(kind, seen.whole("", "of rounded ones give the largest as confidence"));
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor> gan_discriminator(
    const Tensor& d_real, const Tensor& d_fake, std::string_view reduction, bool grad) {
  MEKD_CHECK(
      reduction == "mean" || reduction == "sum", "reduction is '", reduction,
      "'; the two batches have no loss for each sample in common: it must be 'mean' or 'sum'");
  return for_dtype(d_real, d_fake, [&](auto type) {
    using A = decltype(type);
    using V = Vec<A>;
    const auto one = [&](const Tensor& d, A sign) {
      return for_elements<A>(
          d, reduction, grad, 8192, [](int64_t, int64_t, A*) {},
          [sign](V x, V, V& slope) {
            const Sigmoids<A> of(V(sign) * x);
            slope = V(sign) * of.sigmoid();
            return of.softplus();
          });
    };
    auto [real, grad_real] = one(d_real, -1);
    auto [fake, grad_fake] = one(d_fake, 1);
    const double both = number(real) + number(fake);
    return std::tuple(scalar(both, real.scalar_type()), grad_real, grad_fake);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) {
  m.impl("gan_generator", TORCH_BOX(&gan_generator));
  m.impl("gan_discriminator", TORCH_BOX(&gan_discriminator));
}

} // namespace mekd

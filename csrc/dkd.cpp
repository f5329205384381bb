// Decoupled KD: the KL of target against rest, and the KL within the rest, each with its weight.
#include "softmax.h"

namespace mekd {
namespace {

// What binary losses need of a logit x, from one exponential: softplus(x) = log(1 + e^x), and the sigmoid.
struct Binary {
  double x, e, l;

  explicit Binary(double logit) : x(logit), e(std::exp(-std::abs(logit))), l(std::log1p(e)) {}
  double softplus() const { return std::max(x, 0.0) + l; }
  double softplus_of_minus() const { return std::max(-x, 0.0) + l; } // -log sigmoid(x)
  double sigmoid() const { return (x >= 0 ? 1 : e) / (1 + e); }
  double sigmoid_of_minus() const { return (x >= 0 ? e : 1) / (1 + e); }
};

// p log(p / q) for a probability and the two -log, with 0 log 0 = 0.
inline double term(double p, double minus_log_p, double minus_log_q) {
  return p == 0 ? 0 : p * (minus_log_q - minus_log_p);
}

Result dkd(
    const Tensor& student, const Tensor& teacher, const Tensor& labels, const Tensor& tau_tensor,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& mask, double alpha, double beta,
    int64_t ignore_index, std::string_view scale, std::string_view reduction, bool grad) {
  MEKD_CHECK(
      teacher.sizes() == student.sizes(), "teacher has shape ", teacher.sizes(), "; it must be ", student.sizes());
  const double tau = positive(tau_tensor);
  return for_dtype(student, teacher, [&](auto kind) {
    using A = decltype(kind);
    const Rows<A> s(student), t(teacher);
    const int64_t classes = student.size(-1);
    const Labels target(labels, s.tensor.size(0), ignore_index, mask);
    const Factors factors = factors_of(student, scale_factor(scale, tau), reduction, weights, target.kept);
    target.check(classes, factors);
    const A unit = static_cast<A>(kLog2e / tau);
    const Output<A> output(grad_dtype(student));
    return for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
      const int64_t label = target[i];
      A hit_s = 0, hit_t = 0;
      // The rest is a softmax of its own, in which the target is masked.
      const auto hide = [&](const Rows<A>& rows, A& hit) {
        return [&](int64_t begin, int64_t n, A* buffer) -> const A* {
          const A* x = rows(i, begin, n, buffer);
          if (label < begin || label >= begin + n) return x;
          hit = x[label - begin];
          if (x != buffer) std::memcpy(buffer, x, n * sizeof(A));
          buffer[label - begin] = -kInf<A>;
          return buffer;
        };
      };
      const Ahead ahead{s.at(i + 1), t.at(i + 1), to, s.item, t.item, output.item};
      Pair<A> rest = read_pair<A>(classes, unit, scratch, ahead, hide(s, hit_s), hide(t, hit_t));
      // Log-odds of the target against all others together.
      const Binary odds_s((double(hit_s) - rest.top_s) / tau - std::log(rest.zs));
      const Binary odds_t((double(hit_t) - rest.top_t) / tau - std::log(rest.zt));
      // Of one class, or of none that either side leaves, there is nothing to compare.
      const double within = classes <= 2 || rest.zs == 0 || rest.zt == 0 ? 0 : beta;
      const double binary =
          term(odds_t.sigmoid(), odds_t.softplus_of_minus(), odds_s.softplus_of_minus()) +
          term(odds_t.sigmoid_of_minus(), odds_t.softplus(), odds_s.softplus());
      if (to) {
        const double pull = alpha * (odds_s.sigmoid() - odds_t.sigmoid());
        const double by = factor / tau;
        if (rest.zs == 0) rest.zs = 1; // divides what is 0 anyway
        if (rest.zt == 0) rest.zt = 1;
        write_pair<A>(classes, unit, scratch, rest, by * (within - pull), by * within, output, to);
        const A value = static_cast<A>(by * pull);
        output.store(&value, to + label * output.item, 1);
      }
      return (alpha == 0 ? 0 : alpha * binary) + (within == 0 ? 0 : within * rest.kl);
    });
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("dkd", TORCH_BOX(&dkd)); }

} // namespace mekd

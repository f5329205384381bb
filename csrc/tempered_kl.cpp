// KL(p_t^tau || softmax(student / tau)) against logits or probabilities, with the student's gradient (q - p) / tau.
#include "tile.h"

namespace mekd {
namespace {

// Probabilities as logits, in the buffer: softmax(log p / tau) is p^(1/tau), normalised. Adds them to total.
template <typename A>
const A* to_logits(const A* p, A* buffer, int64_t n, int64_t row, Probabilities& seen, double& total) {
  using V = Vec<A>;
  V least(0), all(0);
  for (int64_t j = 0; j < n; j += kWidth<A>) {
    const V x = V::load(p + j, n - j);
    least = lower(x, least);
    all = all + x;
    log(x).store(buffer + j);
  }
  const A lowest = lowest_of(least);
  seen.look_at(row, lowest);
  total += sum(all);
  return buffer;
}

Result tempered_kl(
    const Tensor& student, const Tensor& target, const Tensor& tau_tensor, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& mask, bool probs, double slack, std::string_view scale, std::string_view reduction, bool grad) {
  MEKD_CHECK(
      target.sizes() == student.sizes(), "target has shape ", target.sizes(), "; it must be ", student.sizes());
  const double tau = positive(tau_tensor);
  return for_dtype(student, target, [&](auto kind) {
    using A = decltype(kind);
    const Rows<A> s(student), t(target);
    const int64_t classes = student.size(-1);
    const Factors factors = factors_of(student, scale_factor(scale, tau), reduction, weights, kept_rows(mask, s.tensor.size(0)));
    const A unit = static_cast<A>(kLog2e / tau);
    const Output<A> output(grad_dtype(student));
    Probabilities seen{slack};
    const auto read_t = [&](int64_t i, int64_t begin, int64_t n, A* buffer, double& total) {
      const A* x = t(i, begin, n, buffer);
      if (probs) x = to_logits(x, buffer, n, i, seen, total);
      if (probs && begin + n == classes && std::abs(total - 1) > slack) seen.off.report(i, total);
      return x;
    };
    Result result =
        classes <= kFewClasses
            ? for_tiles<A>(
                  student, factors, grad, 1 / tau, [&](int64_t i, A* buffer) { return s(i, 0, classes, buffer); },
                  [&](int64_t i, A* buffer) {
                    double total = 0;
                    return read_t(i, 0, classes, buffer, total);
                  })
            : for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
                double total = 0;
                const Ahead ahead{s.at(i + 1), t.at(i + 1), to, s.item, t.item, output.item};
                const Pair<A> pair = read_pair<A>(
                    classes, unit, scratch, ahead,
                    [&](int64_t begin, int64_t n, A* buffer) { return s(i, begin, n, buffer); },
                    [&](int64_t begin, int64_t n, A* buffer) { return read_t(i, begin, n, buffer, total); });
                if (to) write_pair<A>(classes, unit, scratch, pair, factor / tau, factor / tau, output, to);
                return pair.kl;
              });
    seen.refuse("probs", seen.whole("", kSayFloor));
    return result;
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("tempered_kl", TORCH_BOX(&tempered_kl)); }

} // namespace mekd

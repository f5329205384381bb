// KL(onehot(label) || softmax(student / tau)), the cross-entropy, with the student's gradient (q - onehot) / tau.
#include "softmax.h"

namespace mekd {
namespace {

Result tempered_kl_labels(
    const Tensor& student, const Tensor& labels, const Tensor& tau_tensor, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& mask, int64_t ignore_index, std::string_view scale, std::string_view reduction,
    bool grad) {
  const double tau = positive(tau_tensor);
  return for_dtype(student, student, [&](auto kind) {
    using A = decltype(kind);
    const Rows<A> s(student);
    const Labels target(labels, s.tensor.size(0), ignore_index, mask);
    const Factors factors = factors_of(student, scale_factor(scale, tau), reduction, weights, target.kept);
    target.check(student.size(-1), factors);
    const A unit = static_cast<A>(kLog2e / tau);
    const Output<A> output(grad_dtype(student));
    return for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
      const int64_t label = target[i];
      const Single<A> all = read_single<A>(student.size(-1), unit, scratch, [&](int64_t begin, int64_t n, A* buffer) {
        return s(i, begin, n, buffer);
      });
      A hit;
      s.load(s.data + i * s.stride + label * s.item, &hit, 1);
      if (to) {
        write_single<A>(student.size(-1), unit, scratch, all, factor / tau, output, to);
        // q - 1 of the label, where the probability may round to 1
        const double q = std::exp2((double(hit) - all.top) * unit) / all.z;
        const A value = static_cast<A>(factor / tau * (q - 1));
        output.store(&value, to + label * output.item, 1);
      }
      return std::log(all.z) - (double(hit) - all.top) / tau;
    });
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("tempered_kl_labels", TORCH_BOX(&tempered_kl_labels)); }

} // namespace mekd

// KL(p_t^tau || softmax(student / tau)) against logits or probabilities, with the student's gradient (q - p) / tau.
#include "tile.h"

namespace mekd {
namespace {

// Probabilities as logits, in the buffer: softmax(log p / tau) is p^(1/tau), normalised.
template <typename A>
const A* to_logits(const A* p, A* buffer, int64_t n, int64_t row, Fault& negative) {
  using V = Vectorized<A>;
  V least(0);
  for (int64_t j = 0; j < padded<A>(n); j += kWidth<A>) {
    V x = V::loadu(p + j);
    if (j + kWidth<A> > n) x = V::set(V(0), x, n - j); // the padding is no probability
    least = at::vec::clamp_max(x, least);
    x.log().store(buffer + j);
  }
  const A lowest = at::vec::vec_reduce_all<A>([](V& a, V& b) { return at::vec::clamp_max(a, b); }, least);
  if (lowest < 0) negative.report(row, lowest);
  return buffer;
}

Result tempered_kl(
    const Tensor& student, const Tensor& target, const Tensor& tau, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& mask, bool probs, std::string_view scale, std::string_view reduction, bool grad) {
  TORCH_CHECK_VALUE(
      target.sizes() == student.sizes(), "target has shape ", target.sizes(), "; it must be ", student.sizes());
  const double warmth = positive(tau);
  return for_dtype(student, target, [&](auto kind) {
    using A = decltype(kind);
    const Rows<A> s(student), t(target);
    const int64_t classes = student.size(-1);
    const Finish how = finish(student, scale_factor(scale, warmth), reduction, weights, mask);
    const A unit = static_cast<A>(kLog2e / warmth);
    const Output<A> output(grad_dtype(student));
    Fault negative;
    const auto read_t = [&](int64_t i, int64_t begin, int64_t n, A* buffer) {
      const A* x = t(i, begin, n, buffer);
      return probs ? to_logits(x, buffer, n, i, negative) : x;
    };
    Result result =
        classes <= kFewClasses
            ? for_tiles<A>(
                  student, how, grad, 1 / warmth, [&](int64_t i, A* buffer) { return s(i, 0, classes, buffer); },
                  [&](int64_t i, A* buffer) { return read_t(i, 0, classes, buffer); })
            : for_rows<A>(student, how, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
                const Ahead ahead{s.at(i + 1), t.at(i + 1), to, s.item, t.item, output.item};
                const Pair<A> pair = read_pair<A>(
                    classes, unit, scratch, ahead,
                    [&](int64_t begin, int64_t n, A* buffer) { return s(i, begin, n, buffer); },
                    [&](int64_t begin, int64_t n, A* buffer) { return read_t(i, begin, n, buffer); });
                if (to) write_pair<A>(classes, unit, scratch, pair, factor / warmth, factor / warmth, output, to);
                return pair.kl;
              });
    TORCH_CHECK_VALUE(
        !negative.found, "probs holds ", negative.value, " in row ", negative.row, "; probabilities are at least 0");
    return result;
  });
}

} // namespace

TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("tempered_kl", tempered_kl); }

} // namespace mekd

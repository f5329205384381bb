// Divergences through a mixture, left KL(p || m) + right KL(q || m), m = beta p + (1 - beta) q, of two softmaxes or of
// log-probabilities taken as they are; beta = 0 is left KL(p || q) and beta = 1 is right KL(q || p).
#include "softmax.h"

namespace mekd {
namespace {

// Logits of the tops that a row's are compared from one by one.
constexpr double kFarApart = 16;

// What is left of each class when log p and log q are known: its part of the loss, and of the derivative in log q.
template <typename A>
struct Weigher {
  using V = Vec<A>;
  // Below this gap = log p - log q, the series: the formula is a difference of numbers 1 / gap times as large.
  static constexpr A kClose = std::is_same_v<A, float> ? 0.25 : 0.0078125;
  double beta, left, right;
  A b, c; // beta, 1 - beta (which float may round to 1 or 0)
  A k;    // beta right - (1 - beta) left, 0 in the Jensen-Shannon divergence
  std::array<A, 6> mixture; // of log(m / q) = beta gap + gap^2 (mixture[5] + mixture[4] gap + ...)

  Weigher(double weight, double of_p, double of_q)
      : beta(weight), left(of_p), right(of_q), b(static_cast<A>(weight)), c(static_cast<A>(1 - weight)),
        k(static_cast<A>(weight * of_q - (1 - weight) * of_p)) {
    if (std::abs(k) < 4 * std::numeric_limits<A>::epsilon()) k = 0;
    // The cumulants of a coin that shows 1 with probability beta.
    const double v = weight * (1 - weight), skew = 1 - 2 * weight;
    mixture = {
        static_cast<A>(v * skew * (1 - 60 * v + 360 * v * v) / 5040), static_cast<A>(v * (1 - 30 * v + 120 * v * v) / 720),
        static_cast<A>(v * skew * (1 - 12 * v) / 120),                static_cast<A>(v * (1 - 6 * v) / 24),
        static_cast<A>(v * skew / 6),                                 static_cast<A>(v / 2)};
  }

  // 0 log 0 = 0
  static V product(V p, V log_ratio) { return select<A>(p == V(0), V(0), p * log_ratio); }

  template <size_t K>
  static V polynomial(V x, const std::array<A, K>& factors) {
    V y(factors[0]);
    for (size_t k = 1; k < K; ++k) y = fma(y, x, V(factors[k]));
    return y;
  }

  // spare: what is 0 over all classes of a row, and only rounding where all are close: what to add then, and infinite
  // where a class is not.
  V operator()(V p, V q, V gap, V& slope, V& spare) const {
    spare = V(0);
    const V l(static_cast<A>(left)), r(static_cast<A>(right));
    if (beta == 0) return slope = -(l * p), l * product(p, gap);
    if (beta == 1) {
      slope = r * select<A>(q == V(0), V(0), q * (V(1) - gap));
      return r * product(q, -gap);
    }
    // log(m / p) and log(m / q), which differ by the gap: of the smaller one, from an exponential that is at most 1.
    const V least = exp2_near(higher(V(0) - abs(gap) * V(static_cast<A>(kLog2e)), V(static_cast<A>(-kNear))));
    const auto above = V(0) < gap; // not so for NaN
    const V ratio = select<A>(above, V(b) + V(c) * least, V(c) + V(b) * least);
    const V less = log_normal(ratio) + (ratio - ratio); // NaN stays NaN
    const V over_p = select<A>(above, less, less - gap), over_q = select<A>(above, less + gap, less);
    const V over = V(0) - r * product(q, over_q);
    // p / q - 1, and log(m / q) but for its first term.
    const V more = gap + gap * gap * polynomial<6>(gap, {A(1. / 5040), A(1. / 720), A(1. / 120), A(1. / 24), A(1. / 6), A(.5)});
    const V second = gap * gap * polynomial<6>(gap, mixture);
    const auto close = abs(gap) < V(kClose); // not so for NaN, the gap between two masked classes
    // The derivatives of log m cancel against those of m, but for k. A constant times q is left out of the slope: it is 0
    // through a softmax, and what is left is small where p and q are close.
    slope = select<A>(close, V(0) - r * q * (V(b) * gap + second), over);
    V near = q * (l * V(c) * gap * more - second * (l * (V(1) + more) + r));
    if (k != 0) {
      slope = slope + V(k * c) * product(q, select<A>(close, more / (V(1) + V(b) * more), (p - q) / (V(b) * p + V(c) * q)));
      near = near - V(k) * q * gap;
      spare = select<A>(close, V(k) * q * more, select<A>(p + q == V(0), V(0), V(kInf<A>)));
    }
    return select<A>(close, near, over - l * product(p, over_p));
  }
};

Result jsd(
    const Tensor& student, const Tensor& teacher, const Tensor& tau_tensor, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& mask, double beta, double left, double right, bool log_probs, std::string_view scale,
    std::string_view reduction, bool grad) {
  MEKD_CHECK(
      teacher.sizes() == student.sizes(), "teacher has shape ", teacher.sizes(), "; it must be ", student.sizes());
  const double tau = positive(tau_tensor);
  return for_dtype(student, teacher, [&](auto kind) {
    using A = decltype(kind);
    using V = Vec<A>;
    const Rows<A> s(student), t(teacher);
    const int64_t classes = student.size(-1);
    const Factors factors = factors_of(student, scale_factor(scale, tau), reduction, weights, kept_rows(mask, s.tensor.size(0)));
    const A unit = static_cast<A>(kLog2e / tau);
    const Output<A> output(grad_dtype(student));
    const Weigher<A> weigh(beta, left, right);
    return for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
      const auto read_s = [&](int64_t begin, int64_t n, A* buffer) { return s(i, begin, n, buffer); };
      const auto read_t = [&](int64_t begin, int64_t n, A* buffer) { return t(i, begin, n, buffer); };
      double by = 1;
      Pair<A> pair{0, 1, 1, 0, 0};
      if (!log_probs) {
        const Ahead ahead{s.at(i + 1), t.at(i + 1), to, s.item, t.item, output.item};
        pair = read_pair<A>(classes, unit, scratch, ahead, read_s, read_t);
        by = 1 / tau;
      }
      // log p - log q = (x - top) * by - log z of both: of the logits' difference, which is exact where they are close, or
      // from both tops where the rows are so far apart that the difference loses what is behind it.
      const A apart = pair.top_t - pair.top_s;
      const bool far = std::abs(apart) > kFarApart;
      const V from_t(far ? pair.top_t : 0), from_s(far ? pair.top_s : 0), rest(far ? 0 : apart);
      const V scale_v(static_cast<A>(by)), two(static_cast<A>(kLog2e));
      const V less(static_cast<A>(std::log(pair.zt / pair.zs)));
      double loss = 0, slopes = 0, spared = 0;
      A read_of_s[kBlock], read_of_t[kBlock];
      for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
        const int64_t n = std::min(kBlock, classes - begin);
        A* const keep_q = scratch.s + begin;
        A* const keep_slope = scratch.t + begin;
        const A* const x = read_s(begin, n, read_of_s);
        const A* const y = read_t(begin, n, read_of_t);
        V of_q(1), of_p(1); // what read_pair left in the scratch is not normalised yet
        if (!log_probs) {
          of_q = V(static_cast<A>(referred(scratch.top_s[block], pair.top_s, unit) / pair.zs));
          of_p = V(static_cast<A>(referred(scratch.top_t[block], pair.top_t, unit) / pair.zt));
        }
        V sum_l(0), sum_g(0), sum_h(0);
        for (int64_t part = 0; part < n; part += kPart) {
          V some_l(0), some_g(0), some_h(0);
          for (int64_t j = part; j < std::min(part + kPart, n); j += kWidth<A>) {
            const V ours = V::load(x + j, n - j, -kInf<A>), theirs = V::load(y + j, n - j, -kInf<A>);
            const V gap = (theirs - from_t - (ours - from_s) - rest) * scale_v - less;
            const V q = log_probs ? exp2(ours * two) : V::load(keep_q + j) * of_q;
            const V p = log_probs ? exp2(theirs * two) : V::load(keep_slope + j) * of_p;
            V slope, spare;
            some_l = some_l + weigh(p, q, gap, slope, spare);
            some_g = some_g + slope;
            some_h = some_h + spare;
            q.store(keep_q + j);
            slope.store(keep_slope + j);
          }
          sum_l = sum_l + some_l;
          sum_g = sum_g + some_g;
          sum_h = sum_h + some_h;
        }
        loss += sum(sum_l);
        slopes += sum(sum_g);
        spared += sum(sum_h);
      }
      if (to) {
        // Through log softmax: g - q sum(g), over tau; log-probabilities get g itself.
        const V pull(static_cast<A>(log_probs ? 0 : slopes)), factors(static_cast<A>(factor * by));
        for (int64_t begin = 0; begin < classes; begin += kBlock) {
          const int64_t n = std::min(kBlock, classes - begin);
          A* const q = scratch.s + begin;
          for (int64_t j = 0; j < n; j += kWidth<A>) {
            ((V::load(scratch.t + begin + j) - V::load(q + j) * pull) * factors).store(q + j);
          }
          output.store(q, to + begin * output.item, n);
        }
      }
      if (!log_probs && std::isfinite(spared)) loss += spared;
      // Log-probabilities that do not add up to 1 may have a KL below 0; nothing else has.
      return loss < 0 && !(log_probs && (beta == 0 || beta == 1)) ? 0. : loss;
    });
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("jsd", TORCH_BOX(&jsd)); }

} // namespace mekd

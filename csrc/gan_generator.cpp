// (base + alpha y) softplus(-d), the generator's GAN loss and the information term, with y, the teacher's top
// probability, taken from its answer on the way.
#include "softmax.h"

namespace mekd {
namespace {

template <typename A>
double load_one(const Tensor& x, int64_t i) {
  A value;
  loader<A>(x.scalar_type())(static_cast<const char*>(x.const_data_ptr()) + i * x.element_size(), &value, 1);
  return value;
}

// One loss and gradient for each element of d, reduced; body(i, value) -> (loss, derivative).
template <typename A, typename Body>
Result for_elements(const Tensor& d, std::string_view reduction, bool grad, int64_t grain, Body body) {
  const Tensor x = d.contiguous();
  const int64_t m = x.numel();
  const bool none = reduction == "none";
  const double by = (reduction == "mean" || reduction == "batchmean") && m ? 1.0 / m : 1.0;
  Tensor gradient = empty_grad(x, grad);
  Tensor losses = at::empty(x.sizes(), x.options().dtype(c10::CppTypeToScalarType<A>::value));
  const Output<A> output(grad_dtype(x));
  A* const loss = losses.mutable_data_ptr<A>();
  char* const to = grad ? static_cast<char*>(gradient.mutable_data_ptr()) : nullptr;
  at::parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [value, slope] = body(i, load_one<A>(x, i));
      loss[i] = static_cast<A>(value);
      const A scaled = static_cast<A>(by * slope);
      if (to) output.store(&scaled, to + i * output.item, 1);
    }
  });
  const auto type = loss_dtype(x);
  if (none) return {losses.to(type), gradient};
  double total = 0;
  for (int64_t i = 0; i < m; ++i) total += loss[i];
  return {scalar(by * total, losses.options().dtype(type)), gradient};
}

// The largest probability of a row of probabilities or, as 1 / sum exp(x - top), of logits.
template <typename A>
double confidence(const Rows<A>& rows, int64_t row, int64_t classes, bool logits, Fault& negative) {
  using V = Vectorized<A>;
  alignas(64) A buffer[kBlock];
  A top = -kInf<A>;
  double z = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin), whole = padded<A>(n);
    const A* const x = rows(row, begin, n, buffer);
    const char* const next = rows.at(row + 1, begin);
    if (!logits) { // there is no sum in which a NaN would show
      V high(-kInf<A>), low(0), nan(0);
      for (int64_t j = 0; j < whole; j += kWidth<A>) {
        V p = V::loadu(x + j);
        if (j + kWidth<A> > n) p = V::set(V(0), p, n - j); // the padding is no probability
        high = at::vec::clamp_min(high, p);
        low = at::vec::clamp_max(low, p);
        nan = nan | (p != p);
        __builtin_prefetch(next + j * rows.item);
      }
      if (sum(nan & V(1)) > 0) return std::numeric_limits<double>::quiet_NaN();
      const A least = at::vec::vec_reduce_all<A>([](V& a, V& b) { return at::vec::clamp_max(a, b); }, low);
      if (least < 0) negative.report(row, least);
      top = std::max(top, at::vec::vec_reduce_all<A>([](V& a, V& b) { return at::vec::clamp_min(a, b); }, high));
      continue;
    }
    const Range<A> all_of = range(x, whole);
    const A before = top;
    top = std::max(top, all_of.high);
    z = z == 0 ? 0 : z * std::exp(double(before) - top);
    const V of(top == -kInf<A> ? 0 : top), unit(static_cast<A>(kLog2e));
    V all(0);
    const auto pass = [&](auto near) {
      for (int64_t j = 0; j < whole; j += kWidth<A>) {
        __builtin_prefetch(next + j * rows.item);
        const V a = (V::loadu(x + j) - of) * unit;
        all = all + (near ? exp2_near(a) : exp2(a));
      }
    };
    (top - all_of.low) * kLog2e < kNear ? pass(std::true_type()) : pass(std::false_type());
    z += sum(all);
  }
  return logits ? 1 / z : top;
}

Result gan_generator(
    const Tensor& d, const std::optional<Tensor>& response, std::string_view kind, double base, double alpha,
    bool minimax, std::string_view reduction, bool grad) {
  const bool known = kind == "confidence";
  if (response.has_value()) {
    TORCH_CHECK_VALUE(
        known ? response->numel() == d.numel() : response->dim() == 2 && response->size(0) == d.numel(), kind,
        " has shape ", response->sizes(), "; d has ", d.sizes());
  }
  return for_dtype(d, d, [&](auto type) {
    using A = decltype(type);
    const bool given = response.has_value() && alpha != 0;
    const Tensor certain = given && known ? response->contiguous() : Tensor();
    const std::optional<Rows<A>> rows = given && !known ? std::optional<Rows<A>>(*response) : std::nullopt;
    const int64_t classes = rows ? response->size(1) : 1;
    const bool logits = kind == "logits";
    Fault negative;
    Result result = for_elements<A>(d, reduction, grad, std::max<int64_t>(1, 32768 / classes), [&](int64_t i, double x) {
      const double y = !given ? 1 : known ? load_one<A>(certain, i) : confidence<A>(*rows, i, classes, logits, negative);
      if (y < 0) negative.report(i, y);
      const double weight = alpha == 0 ? 0 : alpha * y;
      const Binary b(x);
      if (minimax) {
        return std::pair(
            weight * b.softplus_of_minus() - base * b.softplus(), -base * b.sigmoid() - weight * b.sigmoid_of_minus());
      }
      return std::pair((base + weight) * b.softplus_of_minus(), -(base + weight) * b.sigmoid_of_minus());
    });
    TORCH_CHECK_VALUE(
        !negative.found, kind, " holds ", negative.value, " for sample ", negative.row,
        "; probabilities are at least 0");
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor> gan_discriminator(
    const Tensor& d_real, const Tensor& d_fake, std::string_view reduction, bool grad) {
  TORCH_CHECK_VALUE(reduction != "none", "reduction is 'none'; the two batches have no loss for each sample in common");
  return for_dtype(d_real, d_fake, [&](auto type) {
    using A = decltype(type);
    const auto one = [&](const Tensor& d, double sign) {
      return for_elements<A>(d, reduction, grad, 8192, [sign](int64_t, double x) {
        const Binary b(sign * x);
        return std::pair(b.softplus(), sign * b.sigmoid());
      });
    };
    auto [real, grad_real] = one(d_real, -1);
    auto [fake, grad_fake] = one(d_fake, 1);
    const double both = real.template item<double>() + fake.template item<double>();
    return std::tuple(scalar(both, real.options()), grad_real, grad_fake);
  });
}

} // namespace

TORCH_LIBRARY_IMPL(mekd, CPU, m) {
  m.impl("gan_generator", gan_generator);
  m.impl("gan_discriminator", gan_discriminator);
}

} // namespace mekd

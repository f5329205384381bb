// tempered_kl against the k best probabilities of a row: what is missing to 1 is spread over the others, or dropped.
#include "softmax.h"

namespace mekd {
namespace {

Result tempered_kl_topk(
    const Tensor& student, const Tensor& values, const Tensor& indices, const Tensor& tau_tensor,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& mask, std::string_view rest, double slack,
    std::string_view scale, std::string_view reduction, bool grad) {
  TORCH_CHECK_VALUE(
      values.sizes() == indices.sizes() && values.dim() == student.dim() && values.size(-1) <= student.size(-1) &&
          values.sizes().slice(0, values.dim() - 1) == student.sizes().slice(0, student.dim() - 1),
      "topk values have shape ", values.sizes(), " and indices ", indices.sizes(), "; student has ", student.sizes());
  const double tau = positive(tau_tensor);
  const bool spread = rest == "spread";
  return for_dtype(student, values, [&](auto kind) {
    using A = decltype(kind);
    const Rows<A> s(student), v(values);
    const Tensor named = indices.reshape({v.tensor.size(0), v.tensor.size(1)}).contiguous();
    const int64_t* const index = named.const_data_ptr<int64_t>();
    const int64_t classes = student.size(-1), k = v.tensor.size(1);
    const Factors factors = factors_of(student, scale_factor(scale, tau), reduction, weights, mask);
    const A unit = static_cast<A>(kLog2e / tau);
    const Output<A> output(grad_dtype(student));
    const bool shared = spread && k < classes;
    Probabilities seen{slack};
    Fault outside, repeated, nothing;
    Result result = for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
      // The target's row as logits, log p: all the others first, then those that are named.
      constexpr A kUnseen = std::numeric_limits<A>::max();
      A* const row = scratch.t;
      scratch.values.resize(padded<A>(k));
      v.load(v.data + i * v.stride, scratch.values.data(), k);
      double missing = 1;
      for (int64_t j = 0; j < k; ++j) missing -= scratch.values[j];
      if (1 - missing > 1 + slack) seen.off.report(i, 1 - missing);
      if (!shared && missing >= 1) nothing.report(i, 1 - missing);
      const double share = shared && missing > 0 ? missing / (classes - k) : 0;
      // Many classes share one logit: where float rounds it, those that are named move along, and the odds are kept.
      const A others = share > 0 ? static_cast<A>(std::log(share)) : -kInf<A>;
      const double shift = share > 0 ? others - std::log(share) : 0;
      std::fill(row, row + classes, kUnseen);
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = index[i * k + j];
        const A p = scratch.values[j];
        if (at < 0 || at >= classes) {
          outside.report(i, at);
          return 0.0;
        }
        if (row[at] != kUnseen) repeated.report(i, at);
        seen.look_at(i, p);
        row[at] = static_cast<A>(std::log(double(p)) + shift);
      }
      for (int64_t j = 0; j < classes; ++j) row[j] = row[j] == kUnseen ? others : row[j];
      for (int64_t j = classes; j < padded<A>(classes); ++j) row[j] = -kInf<A>;

      const Ahead ahead{s.at(i + 1), s.at(i + 1), to, s.item, s.item, output.item};
      const Pair<A> pair = read_pair<A>(
          classes, unit, scratch, ahead, [&](int64_t begin, int64_t n, A* buffer) { return s(i, begin, n, buffer); },
          [&](int64_t, int64_t, A* buffer) { return buffer; });
      if (to) write_pair<A>(classes, unit, scratch, pair, factor / tau, factor / tau, output, to);
      return pair.kl;
    });
    TORCH_CHECK_VALUE(
        !outside.found, "topk indices hold ", int64_t(outside.value), " in row ", outside.row, "; classes are 0 to ",
        classes - 1);
    TORCH_CHECK_VALUE(
        !repeated.found, "topk indices hold ", int64_t(repeated.value), " twice in row ", repeated.row,
        "; a row names a class once");
    seen.refuse("topk values", seen.whole(" at most", kSayFloor));
    TORCH_CHECK_VALUE(
        !nothing.found, "topk values sum to ", nothing.value, " in row ", nothing.row,
        "; where nothing is spread one of them must be above 0");
    return result;
  });
}

} // namespace

TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("tempered_kl_topk", tempered_kl_topk); }

} // namespace mekd

// tempered_kl against the k best probabilities of a row: what is missing to 1 is spread over the others, dropped, or a
// bucket of its own, which is held against all that the student gives to the others.
#include "softmax.h"

namespace mekd {
namespace {

// What is wrong with the answers, as they are read; index -1 is an absent entry.
struct Answers {
  Probabilities seen;
  Fault outside, repeated, nothing;

  void refuse(int64_t classes) const {
    MEKD_CHECK(
        !outside.found, "topk indices hold ", int64_t(outside.value), " in row ", outside.row, "; classes are 0 to ",
        classes - 1, ", and -1 is an absent entry");
    MEKD_CHECK(
        !repeated.found, "topk indices hold ", int64_t(repeated.value), " twice in row ", repeated.row,
        "; a row names a class once");
    seen.refuse("topk values", seen.whole(" at most", kSayFloor));
    MEKD_CHECK(
        !nothing.found, "topk values sum to ", nothing.value, " in row ", nothing.row,
        "; where nothing is spread one of them must be above 0");
  }
};

// p (log p - log q), where 0 log 0 = 0
inline double kl_part(double p, double log_p, double log_q) { return p == 0 ? 0 : p * (log_p - log_q); }

// A named class: the student's logit and the logarithm of its weight, over tau, and e to the power of both.
struct Named {
  int64_t at;
  double x, log_w, q, w;
};

// KL over the named classes and one bucket for the others, whose exponentials are added up: 1 less the named would be
// left with their rounding. The gradient is by * (q - p) for those that are named, and for the others, all of which
// want the same factor, by * (q - p of the bucket * q / q of the bucket).
template <typename A>
double run_buckets(
    const Rows<A>& s, int64_t row, const int64_t* index, int64_t k, int64_t classes, double tau, int64_t unnamed,
    double share, Scratch<A>& scratch, double by, const Output<A>& output, char* to) {
  using V = Vec<A>;
  const A unit = static_cast<A>(kLog2e / tau);
  const Single<A> others = read_single<A>(classes, unit, scratch, [&](int64_t begin, int64_t n, A* buffer) {
    const A* const x = s(row, begin, n, buffer);
    for (int64_t j = 0; j < n; j += kWidth<A>) (V::load(x + j, n - j) + V::load(scratch.t + begin + j)).store(buffer + j);
    return buffer;
  });
  const bool empty = others.z == 0; // all are named, or all the others are masked
  double top = empty ? -kInf<double> : double(others.top), most = share;
  std::vector<Named> entries;
  entries.reserve(k);
  for (int64_t j = 0; j < k; ++j) {
    if (index[j] == -1) continue;
    A logit;
    s.load(s.at(row, index[j]), &logit, 1);
    entries.push_back({index[j], double(logit), double(scratch.values[j]), 0, 0});
    top = std::max(top, double(logit));
    most = std::max(most, double(scratch.values[j]));
  }
  // The sums of both sides, referred to the largest logit and to the largest probability.
  const double log_rest = std::log(double(unnamed)) + std::log(share / most) / tau;
  const double together = empty ? 0 : others.z * std::exp((others.top - top) / tau), rest = std::exp(log_rest);
  double zs = together, zt = rest;
  for (Named& e : entries) {
    e.x = (e.x - top) / tau;
    e.log_w = std::log(e.log_w / most) / tau;
    zs += e.q = std::exp(e.x);
    zt += e.w = std::exp(e.log_w);
  }
  const double log_zs = std::log(zs), log_zt = std::log(zt);
  if (to) {
    const Single<A> part{empty ? 1 : others.z, others.top};
    write_single<A>(classes, unit, scratch, part, by * (together / zs - rest / zt), output, to);
  }
  double kl = kl_part(rest / zt, log_rest - log_zt, std::log(others.z) + (others.top - top) / tau - log_zs);
  for (const Named& e : entries) {
    kl += kl_part(e.w / zt, e.log_w - log_zt, e.x - log_zs);
    const A grad = static_cast<A>(by * (e.q / zs - e.w / zt));
    if (to) output.store(&grad, to + e.at * output.item, 1);
  }
  return kl < 0 ? 0 : kl; // below 0 by rounding alone
}

// Which rows count: those that neither the mask leaves out nor, where nothing is spread, name no class at all.
inline Kept answered(const int64_t* index, int64_t rows, int64_t k, Kept kept) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t* const row = index + i * k;
    if (std::any_of(row, row + k, [](int64_t at) { return at != -1; })) continue;
    kept.resize(rows, 1);
    kept[i] = 0;
  }
  return kept;
}

// The KL with a bucket for what a row of values does not name, for every row.
template <typename A>
Result with_bucket(
    const Tensor& student, const Rows<A>& s, const Rows<A>& v, const Tensor& named, double tau, const Factors& factors,
    const Output<A>& output, bool grad, Answers& answers) {
  const int64_t classes = student.size(-1), k = v.tensor.size(1);
  return for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
    const int64_t* const index = named.const_data_ptr<int64_t>() + i * k;
    scratch.values.resize(padded<A>(k));
    v.load(v.at(i), scratch.values.data(), k);
    // What is added to the student's logits so that the others are left: 0, and -inf for those that are named.
    A* const hidden = scratch.t;
    std::fill(hidden, hidden + padded<A>(classes), A(0));
    double missing = 1;
    int64_t unnamed = classes;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t at = index[j];
      if (at == -1) {
        scratch.values[j] = 0;
        continue;
      }
      if (at < 0 || at >= classes) {
        answers.outside.report(i, at);
        return 0.0;
      }
      if (hidden[at] != 0) answers.repeated.report(i, at);
      answers.seen.look_at(i, scratch.values[j]);
      hidden[at] = -kInf<A>;
      missing -= scratch.values[j];
      --unnamed;
    }
    if (1 - missing > 1 + answers.seen.slack) answers.seen.off.report(i, 1 - missing);
    if (unnamed == 0 && missing >= 1) answers.nothing.report(i, 1 - missing);
    const double share = unnamed > 0 && missing > 0 ? missing / unnamed : 0;
    return run_buckets<A>(s, i, index, k, classes, tau, unnamed, share, scratch, factor / tau, output, to);
  });
}

Result tempered_kl_topk(
    const Tensor& student, const Tensor& values, const Tensor& indices, const Tensor& tau_tensor,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& mask, std::string_view rest, double slack,
    std::string_view scale, std::string_view reduction, bool grad) {
  MEKD_CHECK(
      values.sizes() == indices.sizes() && values.dim() == student.dim() && values.size(-1) <= student.size(-1) &&
          values.sizes().slice(0, values.dim() - 1) == student.sizes().slice(0, student.dim() - 1),
      "topk values have shape ", values.sizes(), " and indices ", indices.sizes(), "; student has ", student.sizes());
  const double tau = positive(tau_tensor);
  const bool spread = rest == "spread", tail = rest == "tail";
  return for_dtype(student, values, [&](auto kind) {
    using A = decltype(kind);
    const Rows<A> s(student), v(values);
    const Tensor named = dense(torch::stable::reshape(indices, {v.tensor.size(0), v.tensor.size(1)}));
    const int64_t* const index = named.const_data_ptr<int64_t>();
    const int64_t classes = student.size(-1), k = v.tensor.size(1);
    Kept kept = kept_rows(mask, s.tensor.size(0));
    if (!spread) kept = answered(index, s.tensor.size(0), k, std::move(kept));
    const Factors factors = factors_of(student, scale_factor(scale, tau), reduction, weights, std::move(kept));
    const A unit = static_cast<A>(kLog2e / tau);
    const Output<A> output(grad_dtype(student));
    Answers answers{{slack}};
    if (tail) {
      Result result = with_bucket<A>(student, s, v, named, tau, factors, output, grad, answers);
      answers.refuse(classes);
      return result;
    }
    Result result = for_rows<A>(student, factors, grad, [&](int64_t i, Scratch<A>& scratch, double factor, char* to) {
      // The target's row as logits, log p: all the others first, then those that are named.
      constexpr A kUnseen = std::numeric_limits<A>::max();
      A* const row = scratch.t;
      scratch.values.resize(padded<A>(k));
      v.load(v.data + i * v.stride, scratch.values.data(), k);
      double missing = 1;
      int64_t there = 0;
      for (int64_t j = 0; j < k; ++j) {
        if (index[i * k + j] == -1) scratch.values[j] = 0;
        there += index[i * k + j] != -1;
        missing -= scratch.values[j];
      }
      const bool shared = spread && there < classes;
      if (1 - missing > 1 + slack) answers.seen.off.report(i, 1 - missing);
      if (!shared && missing >= 1) answers.nothing.report(i, 1 - missing);
      const double share = shared && missing > 0 ? missing / (classes - there) : 0;
      // Many classes share one logit: where float rounds it, those that are named move along, and the odds are kept.
      const A others = share > 0 ? static_cast<A>(std::log(share)) : -kInf<A>;
      const double shift = share > 0 ? others - std::log(share) : 0;
      std::fill(row, row + classes, kUnseen);
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = index[i * k + j];
        const A p = scratch.values[j];
        if (at == -1) continue;
        if (at < 0 || at >= classes) {
          answers.outside.report(i, at);
          return 0.0;
        }
        if (row[at] != kUnseen) answers.repeated.report(i, at);
        answers.seen.look_at(i, p);
        row[at] = static_cast<A>(std::log(double(p)) + shift);
      }
      for (int64_t j = 0; j < classes; ++j) row[j] = row[j] == kUnseen ? others : row[j];

      const Ahead ahead{s.at(i + 1), s.at(i + 1), to, s.item, s.item, output.item};
      const Pair<A> pair = read_pair<A>(
          classes, unit, scratch, ahead, [&](int64_t begin, int64_t n, A* buffer) { return s(i, begin, n, buffer); },
          [&](int64_t, int64_t, A* buffer) { return buffer; });
      if (to) write_pair<A>(classes, unit, scratch, pair, factor / tau, factor / tau, output, to);
      return pair.kl;
    });
    answers.refuse(classes);
    return result;
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) { m.impl("tempered_kl_topk", TORCH_BOX(&tempered_kl_topk)); }

} // namespace mekd

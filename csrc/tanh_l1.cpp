// Per-sample L1 distance of tanh(a) and tanh(b), of tanh(a) and a finished image, or of two images, with the gradient
// of a; the in-place twin writes it over a, since a large fresh tensor costs more in page faults than the computation.
#include "rows.h"

namespace mekd {
namespace {

constexpr int kTogether = 2; // vectors of pixels
constexpr int64_t kAhead = 512; // elements between what is worked on and what is asked for
constexpr int64_t kChunk = 1 << 14; // elements of one sample that one task works on

// slope with the sign of d, and 0 at ties, as the sub-gradient of PyTorch's abs.
template <typename A>
inline Vec<A> with_sign(Vec<A> slope, Vec<A> d) {
  using V = Vec<A>;
  return V::of_bits((slope.bits() ^ (d.bits() & V(-A(0)).bits())) & (d != V(0)));
}

// e^2x to 1.5 ulp, cut off where tanh(x) has long been 1 (at e^44, so that the product of two stays finite). Here x
// itself is reduced, by n ln(2) / 2, which loses nothing: an argument that was multiplied and rounded before would be
// off to the same side in a and b alike, and sums of thousands show it.
template <int K>
inline Several<float, K> exp_twice(Several<float, K> x) {
  using V = Vec<float>;
  Several<float, K> rounded, r, y;
  for (int k = 0; k < K; ++k) x[k] = lower(higher(x[k], V(-22.f)), V(22.f));
  for (int k = 0; k < K; ++k) rounded[k] = fma(x[k], V(static_cast<float>(2 * kLog2e)), V(kMagic));
  for (int k = 0; k < K; ++k) r[k] = fma(V(kMagic) - rounded[k], V(static_cast<float>(kLog2 / 2)), x[k]);
  for (int k = 0; k < K; ++k) y[k] = V(8.859938383e-02f);
  for (const float c : {2.679729760e-01f, 6.666880250e-01f, 1.333314538f, 1.999999762f, 2.f, 1.f}) {
    for (int k = 0; k < K; ++k) y[k] = fma(y[k], r[k], V(c));
  }
  for (int k = 0; k < K; ++k) y[k] = times_power(y[k], rounded[k]);
  return y;
}

template <int K>
inline Several<double, K> exp_twice(Several<double, K> x) {
  using V = Vec<double>;
  for (V& v : x) v = exp(lower(higher(v, V(-22.)), V(22.)) * V(2.));
  return x;
}

// Half of |tanh(a) - tanh(b)|, or of |tanh(a) - b| for a finished image, and a quarter of its derivative in a. With
// e = e^2a and f = e^2b the difference is 2 (e - f) / ((e + 1)(f + 1)) and 1 - tanh(a)^2 = 4 e / (e + 1)^2: two
// exponentials and one division. tanh is monotonous, so that the sign is that of a - b.
template <typename A, int K>
inline Several<A, K> distance(const Several<A, K>& a, const Several<A, K>& b, Several<A, K>& slope) {
  using V = Vec<A>;
  Several<A, 2 * K> both;
  for (int k = 0; k < K; ++k) both[k] = a[k], both[K + k] = b[k];
  both = exp_twice<2 * K>(both);
  Several<A, K> result;
  for (int k = 0; k < K; ++k) {
    const V e = both[k], f = both[K + k], v = f + V(1), r = V(1) / fma(e, v, v), u = v * r;
    slope[k] = with_sign(e * u * u, a[k] - b[k]);
    result[k] = abs((e - f) * r);
  }
  return result;
}

template <typename A, int K>
inline Several<A, K> distance_finished(const Several<A, K>& a, const Several<A, K>& b, Several<A, K>& slope) {
  using V = Vec<A>;
  const V one(1);
  const Several<A, K> twice = exp_twice<K>(a);
  Several<A, K> result;
  for (int k = 0; k < K; ++k) {
    // (e - 1) / (e + 1) - b over one denominator: near 0, where images lie, 1 - 2 / (e + 1) would lose digits
    const V e = twice[k], r = one / (e + one), gap = fma(-b[k], e, e - one - b[k]) * r;
    slope[k] = with_sign(e * r * r, one - (r + r) - b[k]); // a tie is one of finished pixels
    result[k] = V(A(0.5)) * abs(gap);
  }
  return result;
}

template <typename A, int K>
inline Several<A, K> distance_images(const Several<A, K>& a, const Several<A, K>& b, Several<A, K>& slope) {
  Several<A, K> result;
  for (int k = 0; k < K; ++k) {
    slope[k] = with_sign(Vec<A>(1), a[k] - b[k]);
    result[k] = abs(a[k] - b[k]);
  }
  return result;
}

template <typename A>
struct Job {
  const char *a, *b;
  char* grad; // nullptr: none wanted
  Load<A> load_a, load_b;
  Store<A> store;
  int64_t item_a, item_b, item_grad;
  bool tanh, finished, direct;
};

// The sum over n elements from begin on; the gradient times factor.
template <typename A>
double chunk(const Job<A>& job, int64_t begin, int64_t n, A factor) {
  using V = Vec<A>;
  constexpr int64_t step = kTogether * kWidth<A>;
  A a[kBlock], b[kBlock];
  double total = 0;
  for (int64_t at = begin; at < begin + n; at += kBlock) {
    const int64_t count = std::min(kBlock, begin + n - at), whole = (count + step - 1) / step * step;
    const bool direct = job.direct && whole == count;
    const A* x = reinterpret_cast<const A*>(job.a) + at;
    const A* y = reinterpret_cast<const A*>(job.b) + at;
    A* to = reinterpret_cast<A*>(job.grad) + at;
    if (!direct) {
      job.load_a(job.a + at * job.item_a, a, count);
      job.load_b(job.b + at * job.item_b, b, count);
      for (int64_t j = count; j < whole; ++j) a[j] = b[j] = 0;
      x = a, y = b, to = a;
    }
    V all(0);
    const V by(job.tanh ? 4 * factor : factor); // distance() leaves 2 and 4 to be multiplied once
    const auto pass = [&](auto f, auto grad) {
      for (int64_t part = 0; part < whole; part += kPart) {
        Several<A, kTogether> some, p, q, slope;
        some.fill(V(0));
        const int64_t end = std::min<int64_t>(part + kPart, whole);
        for (int64_t j = part; j < end; j += kTogether * kWidth<A>) {
          __builtin_prefetch(x + j + kAhead);
          __builtin_prefetch(y + j + kAhead);
          for (int k = 0; k < kTogether; ++k) p[k] = V::load(x + j + k * kWidth<A>);
          for (int k = 0; k < kTogether; ++k) q[k] = V::load(y + j + k * kWidth<A>);
          const auto value = f(p, q, slope);
          for (int k = 0; k < kTogether; ++k) some[k] = some[k] + value[k];
          if constexpr (grad) {
            for (int k = 0; k < kTogether; ++k) (slope[k] * by).store(to + j + k * kWidth<A>);
          }
        }
        for (const V& one : some) all = all + one;
      }
    };
    const auto either = [&](auto f) { job.grad ? pass(f, std::true_type()) : pass(f, std::false_type()); };
    if (!job.tanh) {
      either(distance_images<A, kTogether>);
    } else if (job.finished) {
      either(distance_finished<A, kTogether>);
    } else {
      either(distance<A, kTogether>);
    }
    // The padding of a finished image is no image, but tanh(0) = 0 all the same.
    total += (job.tanh ? 2.0 : 1.0) * sum(all);
    if (job.grad && !direct) job.store(a, job.grad + at * job.item_grad, count);
  }
  return total;
}

// a: dense, samples one after another, in whatever order the pixels of each lie; b laid out alike.
Tensor distances(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& weights, bool tanh, bool finished,
    std::string_view reduction, void* grad, ScalarType grad_type) {
  const int64_t samples = a.size(0), pixels = samples ? a.numel() / samples : 0;
  const int64_t pieces = (pixels + kChunk - 1) / kChunk;
  const int64_t divisor = reduction == "mean" ? a.numel() : reduction == "batchmean" ? samples : 1;
  std::vector<double> by(samples, 1.0 / std::max<int64_t>(divisor, 1));
  if (weights.has_value()) {
    MEKD_CHECK(
        weights->numel() == samples, "weights have shape ", weights->sizes(), "; there are ", samples, " samples");
    const Tensor flat = dense(as_dtype(*weights, ScalarType::Double));
    for (int64_t i = 0; i < samples; ++i) by[i] *= flat.const_data_ptr<double>()[i];
  }
  return for_dtype(a, a, [&](auto kind) {
    using A = decltype(kind);
    const auto own = kType<A>;
    const Job<A> job{
        static_cast<const char*>(a.const_data_ptr()), static_cast<const char*>(b.const_data_ptr()),
        static_cast<char*>(grad), loader<A>(a.scalar_type()), loader<A>(b.scalar_type()), storer<A>(grad_type),
        static_cast<int64_t>(a.element_size()), static_cast<int64_t>(b.element_size()),
        static_cast<int64_t>(item_size(grad_type)), tanh, finished,
        a.scalar_type() == own && b.scalar_type() == own && grad_type == own};
    std::vector<double> parts(samples * pieces);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::clamp<int64_t>(pixels, 1, kChunk));
    torch::stable::parallel_for(0, samples * pieces, grain, [&](int64_t from, int64_t until) {
      for (int64_t task = from; task < until; ++task) {
        const int64_t i = task / pieces, first = task % pieces * kChunk, begin = i * pixels + first;
        const int64_t n = std::min(kChunk, pixels - first);
        if (by[i] != 0) {
          parts[task] = chunk<A>(job, begin, n, static_cast<A>(by[i]));
        } else if (job.grad) { // of weight 0 an image may hold anything, and 0 times NaN is NaN
          std::memset(job.grad + begin * job.item_grad, 0, n * job.item_grad);
        }
      }
    });
    const bool none = reduction == "none";
    Tensor loss = empty(none ? Sizes(samples) : Sizes(), own);
    double total = 0;
    for (int64_t i = 0; i < samples; ++i) {
      double one = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) one += parts[i * pieces + piece];
      one *= by[i];
      total += one;
      if (none) loss.mutable_data_ptr<A>()[i] = static_cast<A>(one);
    }
    if (!none) *loss.mutable_data_ptr<A>() = static_cast<A>(total);
    return loss;
  });
}

// Whether the memory holds (m, H, W, ch) without gaps; where a size is 1 its stride says nothing.
bool channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// Samples one after another without gaps: NCHW and channels_last need no copy.
bool sample_major(const Tensor& x) { return x.is_contiguous() || channels_last(x); }

Tensor empty_like(const Tensor& x, ScalarType type) {
  return empty(x.sizes(), type, x.is_contiguous() ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
}

Tensor laid_out_as(const Tensor& b, const Tensor& a) {
  MEKD_CHECK(b.sizes() == a.sizes(), "b has shape ", b.sizes(), "; it must be ", a.sizes());
  if (b.strides() == a.strides()) return b;
  Tensor copy = empty_like(a, b.scalar_type());
  return torch::stable::copy_(copy, b);
}

Result tanh_l1(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& weights, bool tanh, bool finished,
    std::string_view reduction, bool grad) {
  const Tensor x = sample_major(a) ? a : dense(a);
  Tensor gradient = grad ? in_huge_pages(empty_like(x, grad_dtype(a))) : empty_grad(a, false);
  Tensor loss = distances(
      x, laid_out_as(b, x), weights, tanh, finished, reduction, grad ? gradient.mutable_data_ptr() : nullptr,
      gradient.scalar_type());
  return {loss, gradient};
}

Tensor tanh_l1_(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& weights, bool tanh, bool finished,
    std::string_view reduction) {
  MEKD_CHECK(
      sample_major(a), "student has shape ", a.sizes(), " and strides ", a.strides(),
      "; inplace=True writes over samples that lie one after another, contiguous or channels_last: use inplace=False");
  return distances(a, laid_out_as(b, a), weights, tanh, finished, reduction, a.mutable_data_ptr(), a.scalar_type());
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(mekd, CPU, m) {
  m.impl("tanh_l1", TORCH_BOX(&tanh_l1));
  m.impl("tanh_l1_", TORCH_BOX(&tanh_l1_));
}

} // namespace mekd

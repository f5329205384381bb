// SIMD helpers over at::vec: everything is computed in blocks of A (float, or double for double tensors), whatever
// the dtype in memory. The same source is compiled once per instruction set; the anonymous namespace keeps the
// functions of one build out of the other.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace mekd {
namespace {

using at::vec::Vectorized;

template <typename A>
constexpr int64_t kWidth = Vectorized<A>::size();

constexpr int64_t kBlock = 1024; // elements that are loaded, scanned and exponentiated while they lie in L1
constexpr int64_t kPart = 128;   // elements after which a sum is put aside: adding alike numbers rounds to one side
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLog2 = 0.6931471805599453;
template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

template <typename A>
constexpr int64_t padded(int64_t n) { // n elements, rounded up to whole vectors
  return (n + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
}

// 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits, with the exponent's bias added to it.
constexpr float kMagic = 12582912.f + 127.f;

// y * 2^n for what rounding left of n: a product, not a sum of exponents, leaves a NaN what it is.
inline Vectorized<float> times_power(Vectorized<float> y, Vectorized<float> rounded) {
  using I = Vectorized<int32_t>;
  return y * at::vec::cast<float>(at::vec::cast<int32_t>(rounded) << I(23));
}

// Vectors that are worked on in turns: each step of one waits for its last, and the others' fill the time.
template <typename A, int K>
using Several = std::array<Vectorized<A>, K>;

// 2^x to 1.5 ulp for |x| <= 126. x = n + r with r in [-1/2, 1/2], a polynomial of degree 6 for 2^r (relative error
// 2e-9), and n as an exponent: half the instructions of a call of Sleef, and inlined.
template <size_t K>
inline std::array<Vectorized<float>, K> exp2_near(std::array<Vectorized<float>, K> x) {
  using V = Vectorized<float>;
  std::array<V, K> rounded, y;
  for (size_t k = 0; k < K; ++k) rounded[k] = x[k] + V(kMagic);
  for (size_t k = 0; k < K; ++k) x[k] = x[k] - (rounded[k] - V(kMagic));
  y.fill(V(1.535336196e-04f));
  for (const float c : {1.339887502e-03f, 9.618436918e-03f, 5.550332367e-02f, 2.402264774e-01f, 6.931471825e-01f, 1.f}) {
    for (size_t k = 0; k < K; ++k) y[k] = at::vec::fmadd(y[k], x[k], V(c));
  }
  for (size_t k = 0; k < K; ++k) y[k] = times_power(y[k], rounded[k]);
  return y;
}

template <size_t K>
inline std::array<Vectorized<double>, K> exp2_near(std::array<Vectorized<double>, K> x) {
  for (auto& v : x) v = v.exp2();
  return x;
}

template <typename A>
inline Vectorized<A> exp2_near(Vectorized<A> x) {
  return exp2_near<1>({x})[0];
}

// The same for any x up to 126; 0 below -126, also for -inf.
inline Vectorized<float> exp2(Vectorized<float> x) {
  using V = Vectorized<float>;
  return V::blendv(exp2_near(x), V(0.f), x < V(-126.f)); // NaN is not below: it stays
}

inline Vectorized<double> exp2(Vectorized<double> x) { return x.exp2(); }

constexpr double kNear = 126;

template <typename A>
inline A sum(Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A>& x, Vectorized<A>& y) { return x + y; }, v);
}

template <typename A>
struct Range {
  A low, high;
};

// Smallest and largest of n elements, n a multiple of the width. A NaN may be lost: it shows in every sum.
template <typename A>
inline Range<A> range(const A* x, int64_t n) {
  using V = Vectorized<A>;
  const auto higher = [](V a, V b) { return at::vec::clamp_min(a, b); }; // one instruction, unlike maximum
  const auto lower = [](V a, V b) { return at::vec::clamp_max(a, b); };
  V high(-kInf<A>), low(kInf<A>);
  for (int64_t j = 0; j < n; j += kWidth<A>) {
    const V v = V::loadu(x + j);
    high = higher(high, v);
    low = lower(low, v);
  }
  return {
      at::vec::vec_reduce_all<A>([&](V& a, V& b) { return lower(a, b); }, low),
      at::vec::vec_reduce_all<A>([&](V& a, V& b) { return higher(a, b); }, high)};
}

// n elements of any floating dtype to A.
template <typename T, typename A>
void load(const void* from, A* to, int64_t n) {
  const T* source = static_cast<const T*>(from);
  int64_t j = 0;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, source, n * sizeof(A));
    return;
  } else if constexpr (std::is_same_v<A, float> && at::vec::is_reduced_floating_point_v<T>) {
    using H = Vectorized<T>;
    for (; j + H::size() <= n; j += H::size()) {
      auto [low, high] = at::vec::convert_to_float<T>(H::loadu(source + j));
      low.store(to + j);
      high.store(to + j + kWidth<float>);
    }
  }
  for (; j < n; ++j) to[j] = static_cast<A>(source[j]);
}

// n elements of A to any floating dtype, rounded once.
template <typename T, typename A>
void store(const A* from, void* to, int64_t n) {
  T* target = static_cast<T*>(to);
  int64_t j = 0;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(target, from, n * sizeof(A));
    return;
  } else if constexpr (std::is_same_v<A, float> && at::vec::is_reduced_floating_point_v<T>) {
    using H = Vectorized<T>;
    for (; j + H::size() <= n; j += H::size()) {
      at::vec::convert_from_float<T>(Vectorized<float>::loadu(from + j), Vectorized<float>::loadu(from + j + kWidth<float>))
          .store(target + j);
    }
  }
  for (; j < n; ++j) target[j] = static_cast<T>(from[j]);
}

template <typename A>
using Load = void (*)(const void*, A*, int64_t);
template <typename A>
using Store = void (*)(const A*, void*, int64_t);

template <typename A>
Load<A> loader(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return load<double, A>;
    case at::kFloat: return load<float, A>;
    case at::kBFloat16: return load<at::BFloat16, A>;
    case at::kHalf: return load<at::Half, A>;
    default: TORCH_CHECK_TYPE(false, "dtype ", type, " is not supported; use float64, float32, bfloat16 or float16");
  }
}

template <typename A>
Store<A> storer(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return store<double, A>;
    case at::kFloat: return store<float, A>;
    case at::kBFloat16: return store<at::BFloat16, A>;
    case at::kHalf: return store<at::Half, A>;
    default: TORCH_CHECK_TYPE(false, "dtype ", type, " is not supported; use float64, float32, bfloat16 or float16");
  }
}

} // namespace
} // namespace mekd

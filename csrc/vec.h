// SIMD in the vector extensions that GCC and Clang share: one source for AVX-512, AVX2, NEON and what else there is, at
// the width of what it is compiled for. Everything is computed in blocks of A (float, or double for double tensors),
// whatever the dtype in memory. The same source is compiled once per instruction set; the anonymous namespace keeps the
// functions of one build out of the other.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // false alarms of GCC 12 about its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace mekd {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename A, int Bytes>
struct RawOf {
  typedef A type __attribute__((vector_size(Bytes)));
};

template <typename A>
constexpr int64_t kWidth = kBytes / sizeof(A);

constexpr int64_t kLine = 64;    // bytes of a line of cache
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

// A vector of A, and what a comparison of two gives: integers as wide, all ones for true.
template <typename A>
struct Vec {
  using Raw = typename RawOf<A, kBytes>::type;
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Ints = typename RawOf<Int, kBytes>::type;
  Raw v;

  Vec() = default;
  Vec(A all) : v(all - Raw{}) {} // not a sum, which would lose the sign of -0
  Vec(Raw raw) : v(raw) {}

  static Vec load(const A* from) {
    Vec x;
    std::memcpy(&x.v, from, kBytes);
    return x;
  }
  // The first n elements at most, and rest in the other lanes.
  static Vec load(const A* from, int64_t n, A rest = 0) {
    if (n >= kWidth<A>) return load(from);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) return (Raw)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), (1u << n) - 1, from);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<A, float>) {
      const __m256i here = first(n);
      return (Raw)_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(from, here), _mm256_castsi256_ps(here));
    }
#endif
    alignas(kBytes) A lanes[kWidth<A>];
    for (int64_t j = 0; j < kWidth<A>; ++j) lanes[j] = j < n ? from[j] : rest;
    return load(lanes);
  }
  void store(A* to) const { std::memcpy(to, &v, kBytes); }
  void store(A* to, int64_t n) const {
    if (n >= kWidth<A>) return store(to);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) return _mm512_mask_storeu_ps(to, (1u << n) - 1, (__m512)v);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<A, float>) return _mm256_maskstore_ps(to, first(n), (__m256)v);
#endif
    std::memcpy(to, &v, n * sizeof(A));
  }

#if defined(__AVX2__)
  static __m256i first(int64_t n) { // all ones in the first n of eight lanes
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
#endif

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  Vec operator-() const { return -v; }
  friend Ints operator<(Vec a, Vec b) { return a.v < b.v; }
  friend Ints operator==(Vec a, Vec b) { return a.v == b.v; }
  friend Ints operator!=(Vec a, Vec b) { return a.v != b.v; }
  Ints bits() const { return (Ints)v; }
  static Vec of_bits(Ints bits) { return (Raw)bits; }
};

template <typename A>
inline Vec<A> select(typename Vec<A>::Ints which, Vec<A> yes, Vec<A> no) {
  return which ? yes.v : no.v;
}

// Where b is NaN they are a; a NaN in a stays. One instruction each, which GCC does not see in the comparison.
template <typename A>
inline Vec<A> higher(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return (typename Vec<A>::Raw)_mm512_max_ps((__m512)b.v, (__m512)a.v);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<A, float>) return (typename Vec<A>::Raw)_mm256_max_ps((__m256)b.v, (__m256)a.v);
#endif
  return b.v > a.v ? b.v : a.v;
}
template <typename A>
inline Vec<A> lower(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return (typename Vec<A>::Raw)_mm512_min_ps((__m512)b.v, (__m512)a.v);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<A, float>) return (typename Vec<A>::Raw)_mm256_min_ps((__m256)b.v, (__m256)a.v);
#endif
  return b.v < a.v ? b.v : a.v;
}

template <typename A>
inline Vec<A> abs(Vec<A> x) {
  return Vec<A>::of_bits(x.bits() & std::numeric_limits<typename Vec<A>::Int>::max());
}

// a * b + c, which compilers contract where the processor can.
template <typename A>
inline Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return a.v * b.v + c.v;
}

// Lanes together: the upper half with the lower one, until one is left.
template <typename A, int Bytes, typename F>
inline A together(typename RawOf<A, Bytes>::type v, F f) {
  if constexpr (Bytes == sizeof(A)) {
    return v[0];
  } else {
    std::array<typename RawOf<A, Bytes / 2>::type, 2> half;
    std::memcpy(&half, &v, Bytes);
    return together<A, Bytes / 2>(f(half[0], half[1]), f);
  }
}

template <typename A>
inline A sum(Vec<A> x) {
  return together<A, kBytes>(x.v, [](auto a, auto b) { return a + b; });
}
template <typename A>
inline A highest_of(Vec<A> x) {
  return together<A, kBytes>(x.v, [](auto a, auto b) { return b > a ? b : a; });
}
template <typename A>
inline A lowest_of(Vec<A> x) {
  return together<A, kBytes>(x.v, [](auto a, auto b) { return b < a ? b : a; });
}

// Vectors that are worked on in turns: each step of one waits for its last, and the others' fill the time.
template <typename A, size_t K>
using Several = std::array<Vec<A>, K>;

// 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits, with the exponent's bias added to it.
constexpr float kMagic = 12582912.f + 127.f;

// y * 2^n for what rounding left of n: a product, not a sum of exponents, leaves a NaN what it is.
inline Vec<float> times_power(Vec<float> y, Vec<float> rounded) { return y * Vec<float>::of_bits(rounded.bits() << 23); }

// 2^x to 1.5 ulp for |x| <= 126. x = n + r with r in [-1/2, 1/2], a polynomial of degree 6 for 2^r (relative error
// 2e-9), and n as an exponent.
template <size_t K>
inline Several<float, K> exp2_near(Several<float, K> x) {
  using V = Vec<float>;
  Several<float, K> rounded, y;
  for (size_t k = 0; k < K; ++k) rounded[k] = x[k] + V(kMagic);
  for (size_t k = 0; k < K; ++k) x[k] = x[k] - (rounded[k] - V(kMagic));
  y.fill(V(1.535336196e-04f));
  for (const float c : {1.339887502e-03f, 9.618436918e-03f, 5.550332367e-02f, 2.402264774e-01f, 6.931471825e-01f, 1.f}) {
    for (size_t k = 0; k < K; ++k) y[k] = fma(y[k], x[k], V(c));
  }
  for (size_t k = 0; k < K; ++k) y[k] = times_power(y[k], rounded[k]);
  return y;
}

// Lane by lane in the C library's doubles, for double tensors: exact, and nobody's hot path.
template <typename F>
inline Vec<double> each(Vec<double> x, F f) {
  for (int64_t j = 0; j < kWidth<double>; ++j) x.v[j] = f(x.v[j]);
  return x;
}

template <size_t K>
inline Several<double, K> exp2_near(Several<double, K> x) {
  for (auto& v : x) v = each(v, [](double one) { return std::exp2(one); });
  return x;
}

template <typename A>
inline Vec<A> exp2_near(Vec<A> x) {
  return exp2_near<1>({x})[0];
}

// The same for any x up to 126; 0 below -126, also for -inf.
inline Vec<float> exp2(Vec<float> x) {
  return select<float>(x < Vec<float>(-126.f), Vec<float>(0.f), exp2_near(x)); // NaN is not below: it stays
}
inline Vec<double> exp2(Vec<double> x) { return exp2_near(x); }

constexpr double kNear = 126;

// e^x to 1.5 ulp for x <= 88, 0 below -87.3. The product that reduces x is taken in two parts, so that far from 0 it
// loses nothing; a polynomial of degree 6 for e^r, r in [-ln(2) / 2, ln(2) / 2], of relative error 4e-9.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V rounded = fma(x, V(static_cast<float>(kLog2e)), V(kMagic)), n = V(kMagic) - rounded;
  const V r = fma(n, V(-2.12194440e-4f), fma(n, V(0.693359375f), x));
  V y(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.f, 1.f}) {
    y = fma(y, r, V(c));
  }
  return select<float>(x < V(-87.3f), V(0.f), times_power(y, rounded));
}
inline Vec<double> exp(Vec<double> x) {
  return each(x, [](double one) { return std::exp(one); });
}

// ln x to 1 ulp of a normal number above 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)], and a polynomial for ln m (Cephes'
// logf coefficients). less: what e is too large by.
inline Vec<float> log_normal(Vec<float> x, Vec<float> less = 0.f) {
  using V = Vec<float>;
  const auto bits = x.bits() - 0x3f3504f3; // the exponent counts from sqrt(1/2) on
  const V e = V(__builtin_convertvector(bits >> 23, V::Raw)) - less;
  const V t = V::of_bits((bits & 0x007fffff) + 0x3f3504f3) - V(1.f), square = t * t;
  V y(7.0376836292e-2f);
  for (const float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                        2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    y = fma(y, t, V(c));
  }
  y = fma(e, V(-2.12194440e-4f), y * t * square);
  return fma(e, V(0.693359375f), t + fma(square, V(-0.5f), y));
}

// The same of any number.
inline Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  const auto tiny = x < V(std::numeric_limits<float>::min());
  V y = log_normal(select<float>(tiny, x * V(8388608.f), x), select<float>(tiny, V(23.f), V(0.f)));
  const V nan(std::numeric_limits<float>::quiet_NaN());
  y = select<float>(x == V(0.f), V(-kInf<float>), select<float>(x < V(0.f), nan, y));
  return select<float>(x != x, x, select<float>(x == V(kInf<float>), x, y));
}
inline Vec<double> log(Vec<double> x) {
  return each(x, [](double one) { return std::log(one); });
}
inline Vec<double> log_normal(Vec<double> x) { return log(x); }

// ln(1 + x) for x from 0 to 1: what rounding 1 + x left out is added by the slope of ln.
inline Vec<float> log1p(Vec<float> x) {
  const Vec<float> u = x + Vec<float>(1.f);
  return log(u) + (x - (u - Vec<float>(1.f))) / u;
}
inline Vec<double> log1p(Vec<double> x) {
  return each(x, [](double one) { return std::log1p(one); });
}

template <typename A>
struct Range {
  A low, high;
};

// Smallest and largest of n elements. A NaN may be lost: it shows in every sum.
template <typename A>
inline Range<A> range(const A* x, int64_t n) {
  constexpr int64_t w = kWidth<A>;
  Several<A, 4> high, low; // each waits for its last
  high.fill(-kInf<A>);
  low.fill(kInf<A>);
  int64_t j = 0;
  for (; j + 4 * w <= n; j += 4 * w) {
    for (int64_t k = 0; k < 4; ++k) {
      const auto v = Vec<A>::load(x + j + k * w);
      high[k] = higher(high[k], v);
      low[k] = lower(low[k], v);
    }
  }
  for (; j < n; j += w) {
    const auto v = Vec<A>::load(x + j, n - j, x[0]);
    high[0] = higher(high[0], v);
    low[0] = lower(low[0], v);
  }
  return {
      lowest_of(lower(lower(low[0], low[1]), lower(low[2], low[3]))),
      highest_of(higher(higher(high[0], high[1]), higher(high[2], high[3])))};
}

// n elements of any floating dtype to A.
template <typename T, typename A>
void load(const void* from, A* to, int64_t n) {
  const T* source = static_cast<const T*>(from);
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, source, n * sizeof(A));
  } else {
    int64_t j = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<T, c10::Half> && std::is_same_v<A, float>) {
      for (; j + 8 <= n; j += 8) {
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j))));
      }
    }
#endif
    for (; j < n; ++j) to[j] = static_cast<A>(source[j]);
  }
}

// n elements of A to any floating dtype, rounded once.
template <typename T, typename A>
void store(const A* from, void* to, int64_t n) {
  T* target = static_cast<T*>(to);
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(target, from, n * sizeof(A));
  } else {
    int64_t j = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<T, c10::Half> && std::is_same_v<A, float>) {
      for (; j + 8 <= n; j += 8) {
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(target + j),
            _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    }
#endif
    for (; j < n; ++j) target[j] = static_cast<T>(from[j]);
  }
}

template <typename A>
using Load = void (*)(const void*, A*, int64_t);
template <typename A>
using Store = void (*)(const A*, void*, int64_t);

} // namespace
} // namespace mekd

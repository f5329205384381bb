// Two softmaxes over one row, in one reading: exponentials block by block, referred to the largest logit so far.
#pragma once

#include "rows.h"

namespace mekd {
namespace {

// Sums over a row, and the largest logit of each side, which they are referred to.
template <typename A>
struct Pair {
  double kl;     // KL(p || q)
  double zs, zt; // sums of the exponentials
  A top_s, top_t;
};

// What is needed next, asked for while the exponentials keep the processor busy: the next row of each side, and the
// place of the gradient. Addresses past the end do no harm.
struct Ahead {
  const char *s = nullptr, *t = nullptr, *grad = nullptr;
  int64_t item_s = 0, item_t = 0, item_grad = 0;

  void fetch(int64_t j) const {
    __builtin_prefetch(s + j * item_s, 0);
    __builtin_prefetch(t + j * item_t, 0);
    __builtin_prefetch(grad + j * item_grad, 1);
  }
};

// Reads a row through load_s and load_t (begin, n, buffer) and leaves 2^((x - top of its block) * unit), which is
// e^((x - top) / tau), in the scratch. unit: log2(e) / tau.
template <typename A, typename LoadS, typename LoadT>
Pair<A> read_pair(
    int64_t classes, A unit, Scratch<A>& scratch, const Ahead& ahead, LoadS load_s, LoadT load_t) {
  using V = Vec<A>;
  A max_s = -kInf<A>, max_t = -kInf<A>, top_s = 0, top_t = 0;
  double zs = 0, zt = 0, weighted = 0;
  for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
    const int64_t n = std::min(kBlock, classes - begin);
    A* const p = scratch.t + begin;
    A* const q = scratch.s + begin;
    const A* const s = load_s(begin, n, q);
    const A* const t = load_t(begin, n, p);

    const Range<A> range_s = range(s, n), range_t = range(t, n);
    max_s = std::max(max_s, range_s.high);
    max_t = std::max(max_t, range_t.high);
    scratch.top_s[block] = max_s;
    scratch.top_t[block] = max_t;
    // Nothing but masks so far: refer to 0. To write_pair the infinite top says that the block counts nothing.
    const A new_s = max_s == -kInf<A> ? 0 : max_s, new_t = max_t == -kInf<A> ? 0 : max_t;
    if (block > 0) { // what was summed so far is referred to the new tops
      const double down_s = (double(top_s) - new_s) * unit, down_t = (double(top_t) - new_t) * unit;
      const double kept = zt == 0 ? 0 : std::exp2(down_t); // nothing is left of it, whatever q was
      weighted = kept == 0 ? 0 : kept * (weighted + zt * (down_t - down_s));
      zs = zs == 0 ? 0 : zs * std::exp2(down_s);
      zt *= kept;
    }
    top_s = new_s;
    top_t = new_t;

    const V by(unit), of_s(top_s), of_t(top_t), zero(0);
    V sum_s(0), sum_t(0), sum_w(0), some_s, some_t, some_w;
    const auto add = [&](int64_t j, V pj, V qj, V weighted_j) {
      some_t = some_t + pj;
      some_s = some_s + qj;
      some_w = some_w + weighted_j;
      pj.store(p + j);
      qj.store(q + j);
    };
    const auto pass = [&](auto near) {
      for (int64_t part = 0; part < n; part += kPart) {
        some_s = some_t = some_w = zero;
        const int64_t end = std::min(part + kPart, n);
        int64_t j = part;
        // Without the care for the far and the masked, which is a fifth of the work.
        for (; near && j + kWidth<A> <= end; j += kWidth<A>) {
          ahead.fetch(begin + j);
          const V a = (V::load(t + j) - of_t) * by, b = (V::load(s + j) - of_s) * by, pj = exp2_near(a);
          add(j, pj, exp2_near(b), pj * (a - b));
        }
        for (; j < end; j += kWidth<A>) {
          ahead.fetch(begin + j);
          const V a = (V::load(t + j, n - j, -kInf<A>) - of_t) * by; // softmax ignores -inf
          const V b = (V::load(s + j, n - j, -kInf<A>) - of_s) * by, pj = exp2(a);
          add(j, pj, exp2(b), select<A>(pj == zero, zero, pj * (a - b))); // 0 log 0 = 0, also where log q is -inf
        }
        sum_s = sum_s + some_s;
        sum_t = sum_t + some_t;
        sum_w = sum_w + some_w;
      }
    };
    const bool near = (top_s - range_s.low) * unit < kNear && (top_t - range_t.low) * unit < kNear;
    near ? pass(std::true_type()) : pass(std::false_type());
    zs += sum(sum_s);
    zt += sum(sum_t);
    weighted += sum(sum_w);
  }
  const double kl = kLog2 * weighted / zt + std::log(zs / zt);
  return {kl < 0 ? 0 : kl, zs, zt, top_s, top_t}; // below 0 by rounding alone
}

// What a block's exponentials, referred to the largest logit so far, are multiplied with once the row's is known.
template <typename A>
double referred(A so_far, A top, A unit) {
  return so_far == top ? 1 : std::exp2((double(so_far) - top) * unit);
}

// grad = by_s * q - by_t * p for the exponentials that read_pair left.
template <typename A>
void write_pair(
    int64_t classes, A unit, const Scratch<A>& scratch, const Pair<A>& pair, double by_s, double by_t, const Output<A>& output,
    char* to) {
  using V = Vec<A>;
  by_s /= pair.zs;
  by_t /= pair.zt;
  for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
    const int64_t n = std::min(kBlock, classes - begin);
    const A* const p = scratch.t + begin;
    A* const q = scratch.s + begin;
    const V of_s(static_cast<A>(by_s * referred(scratch.top_s[block], pair.top_s, unit)));
    const V of_t(static_cast<A>(by_t * referred(scratch.top_t[block], pair.top_t, unit)));
    A* const grad = output.same ? reinterpret_cast<A*>(to) + begin : q;
    for (int64_t j = 0; j < n; j += kWidth<A>) (V::load(q + j) * of_s - V::load(p + j) * of_t).store(grad + j, n - j);
    if (grad == q) output.store(q, to + begin * output.item, n);
  }
}

// One side alone: the largest logit, and the sum of the exponentials referred to it.
template <typename A>
struct Single {
  double z;
  A top;
};

// read_pair without a target: the exponentials are left in scratch.s.
template <typename A, typename Read>
Single<A> read_single(int64_t classes, A unit, Scratch<A>& scratch, Read load) {
  using V = Vec<A>;
  A highest = -kInf<A>, top = 0;
  double z = 0;
  for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
    const int64_t n = std::min(kBlock, classes - begin);
    A* const q = scratch.s + begin;
    const A* const s = load(begin, n, q);
    highest = std::max(highest, range(s, n).high);
    scratch.top_s[block] = highest;
    const A now = highest == -kInf<A> ? 0 : highest;
    z = z == 0 ? 0 : z * std::exp2((double(top) - now) * unit);
    top = now;
    V total(0);
    for (int64_t j = 0; j < n; j += kWidth<A>) {
      const V qj = exp2((V::load(s + j, n - j, -kInf<A>) - V(top)) * V(unit));
      total = total + qj;
      qj.store(q + j);
    }
    z += sum(total);
  }
  return {z, top};
}

// grad = by * q
template <typename A>
void write_single(
    int64_t classes, A unit, const Scratch<A>& scratch, const Single<A>& single, double by, const Output<A>& output,
    char* to) {
  using V = Vec<A>;
  for (int64_t begin = 0, block = 0; begin < classes; begin += kBlock, ++block) {
    const int64_t n = std::min(kBlock, classes - begin);
    A* const q = scratch.s + begin;
    const V of(static_cast<A>(by / single.z * referred(scratch.top_s[block], single.top, unit)));
    A* const grad = output.same ? reinterpret_cast<A*>(to) + begin : q;
    for (int64_t j = 0; j < n; j += kWidth<A>) (V::load(q + j) * of).store(grad + j, n - j);
    if (grad == q) output.store(q, to + begin * output.item, n);
  }
}

} // namespace
} // namespace mekd

// tempered_kl for few classes: a row would fill a vector or two and cost more in sums across it than in exponentials.
// A tile holds as many rows as a vector has lanes, class after class, and everything runs down the lanes.
#pragma once

#include "softmax.h"

namespace mekd {
namespace {

constexpr int64_t kFewClasses = 32;

template <typename A>
struct Tile {
  alignas(64) A s[kFewClasses * kWidth<A>]; // logits, then exponentials
  alignas(64) A t[kFewClasses * kWidth<A>];
};

// One row into, or out of, a lane.
template <typename A>
void to_lane(const A* row, A* tile, int64_t lane, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) tile[c * kWidth<A> + lane] = row[c];
}

template <typename A>
void from_lane(const A* tile, A* row, int64_t lane, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) row[c] = tile[c * kWidth<A> + lane];
}

// The KL of each lane; the tile keeps by * (q - p), by a vector of what each lane is multiplied with.
template <typename A>
Vec<A> run_tile(Tile<A>& tile, int64_t classes, A unit, Vec<A> by) {
  using V = Vec<A>;
  constexpr int64_t w = kWidth<A>;
  V top_s(-kInf<A>), top_t(-kInf<A>), zs(0), zt(0), weighted(0);
  for (int64_t c = 0; c < classes; ++c) {
    top_s = higher(top_s, V::load(tile.s + c * w));
    top_t = higher(top_t, V::load(tile.t + c * w));
  }
  const V zero(0), of(unit);
  top_s = select<A>(top_s == V(-kInf<A>), zero, top_s); // a row of masks alone divides 0 by 0 below
  top_t = select<A>(top_t == V(-kInf<A>), zero, top_t);
  for (int64_t c = 0; c < classes; ++c) {
    const V a = (V::load(tile.t + c * w) - top_t) * of, b = (V::load(tile.s + c * w) - top_s) * of;
    const V p = exp2(a), q = exp2(b);
    zt = zt + p;
    zs = zs + q;
    weighted = weighted + select<A>(p == zero, zero, p * (a - b)); // 0 log 0 = 0, also where log q is -inf
    p.store(tile.t + c * w);
    q.store(tile.s + c * w);
  }
  const V by_s = by / zs, by_t = by / zt;
  for (int64_t c = 0; c < classes; ++c) {
    (V::load(tile.s + c * w) * by_s - V::load(tile.t + c * w) * by_t).store(tile.s + c * w);
  }
  const V kl = V(static_cast<A>(kLog2)) * weighted / zt + log(zs / zt);
  return select<A>(kl < zero, zero, kl); // below 0 by rounding alone
}

// for_rows for tempered_kl on tiles: read_s and read_t (row, buffer) fill a row of logits.
template <typename A, typename ReadS, typename ReadT>
Result for_tiles(
    const Tensor& student, const Factors& factors, bool grad, double inverse_tau, ReadS read_s, ReadT read_t) {
  constexpr int64_t w = kWidth<A>;
  const int64_t classes = student.size(-1);
  const A unit = static_cast<A>(kLog2e * inverse_tau);
  return for_losses<A>(student, factors, grad, w, [&](int64_t begin, int64_t end, A* loss, char* to, const Output<A>& output) {
    Tile<A> tile;
    alignas(64) A row[kFewClasses + w], of[w], losses[w];
    for (int64_t first = begin; first < end; first += w) {
      const int64_t lanes = std::min(w, end - first);
      for (int64_t lane = 0; lane < w; ++lane) {
        const int64_t i = first + lane;
        const bool counts = lane < lanes && !factors.skips(i);
        of[lane] = counts ? static_cast<A>(factors.of(i)) : 0;
        if (!counts) std::fill(row, row + classes, A(0));
        to_lane(counts ? read_s(i, row) : row, tile.s, lane, classes);
        to_lane(counts ? read_t(i, row) : row, tile.t, lane, classes);
      }
      const auto by = Vec<A>::load(of);
      (run_tile<A>(tile, classes, unit, by * Vec<A>(static_cast<A>(inverse_tau))) * by).store(losses);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        loss[first + lane] = losses[lane];
        if (!to) continue;
        from_lane(tile.s, row, lane, classes);
        output.store(row, to + (first + lane) * classes * output.item, classes);
      }
    }
  });
}

} // namespace
} // namespace mekd

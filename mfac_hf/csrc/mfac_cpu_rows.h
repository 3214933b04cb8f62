// What the passes over the window have in common: tiles of columns, groups of rows, products and sums of a tile.
//
// Each 32-bit word holds two bfloat16. A shift widens the first and a mask the second, which is half the work of spreading 16-bit
// numbers over a register (on a processor with registers of 32 bytes that took longer than memory). So one vector of a pair gets
// the even numbers of a run and the other the odd ones, and what is multiplied with them is brought into the same order first.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "mfac_cpu.h"

namespace mfac {

constexpr int64_t RUN = 2048;      // columns summed in the working precision before they are added in float64
constexpr int64_t COLUMNS = 4096;  // columns of a group of rows before the next group; the vector's part stays in cache
constexpr int STREAMS = 8;         // rows at once: they share every load of the vector and keep many requests to memory under way

// The numbers of a pair of vectors.
template <typename A>
constexpr int64_t PAIR = 2 * Lanes<A>::COUNT;

// Whether a pair of vectors gets the even and the odd numbers of a run, or its first half and its second.
template <typename G, typename A>
constexpr bool ALTERNATES = std::is_same_v<G, BFloat16> && std::is_same_v<A, float>;

// Reads PAIR numbers of the window.
template <typename A, typename G>
inline void load_pair(const G* p, Vector<A>& first, Vector<A>& second) {
  if constexpr (ALTERNATES<G, A>) {
    static_assert(std::endian::native == std::endian::little, "the even numbers are the lower halves of words");
    using Words = typename Lanes<A>::Words;
    const Words words = raw_load<Words>(p);
    first = reinterpret_cast<Vector<A>>(words << 16);
    second = reinterpret_cast<Vector<A>>(words & 0xffff0000u);
  } else {
    first = load<A>(p);
    second = load<A>(p + Lanes<A>::COUNT);
  }
}

// Where number i of a vector goes to meet its number of the window. What is left over after the last pair keeps its place.
template <typename G, typename A>
inline int64_t place_of(int64_t i, int64_t n) {
  if (!ALTERNATES<G, A> || i >= n / PAIR<A> * PAIR<A>) return i;
  return i / PAIR<A> * PAIR<A> + i % 2 * Lanes<A>::COUNT + i % PAIR<A> / 2;
}

// Asks memory for PAIR numbers of each of STREAMS rows. Never faults, not even beyond the end of the window.
template <typename A, typename G>
inline void fetch(const G* p, int64_t stride) {
#pragma GCC unroll 8
  for (int k = 0; k < STREAMS; ++k) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p) + k * stride * sizeof(G);
#pragma GCC unroll 8
    for (int64_t byte = 0; byte < PAIR<A> * static_cast<int64_t>(sizeof(G)); byte += LINE) {
      __builtin_prefetch(reinterpret_cast<const void*>(address + byte), 0, 2);
    }
  }
}

// totals[k] += dot product of the n numbers at rows[k] with x; n <= RUN, summed in the working precision A.
template <typename G, typename A>
inline void dot_run(const G* const* rows, const G* next, int64_t stride, const A* x, int64_t n, double* totals) {
  constexpr int64_t W = Lanes<A>::COUNT;
  Vector<A> sums[STREAMS] = {};
  int64_t i = 0;
  for (; i + PAIR<A> <= n; i += PAIR<A>) {
    fetch<A>(next + i, stride);
    const Vector<A> x_first = load<A>(x + i), x_second = load<A>(x + i + W);
#pragma GCC unroll 8
    for (int k = 0; k < STREAMS; ++k) {
      Vector<A> first, second;
      load_pair<A>(rows[k] + i, first, second);
      sums[k] += first * x_first;
      sums[k] += second * x_second;
    }
  }
  for (int k = 0; k < STREAMS; ++k) {
    double total = 0;
    for (int64_t lane = 0; lane < W; ++lane) total += sums[k][lane];
    for (int64_t j = i; j < n; ++j) total += static_cast<double>(widen<A>(rows[k][j])) * x[j];
    totals[k] += total;
  }
}

// sums[0..n) += sum over COUNT rows of w[k] * g[k][0..n)
template <int COUNT, typename G, typename A>
inline void add_rows(const G* g, const G* next, int64_t stride, const A* w, A* sums, int64_t n) {
  constexpr int64_t W = Lanes<A>::COUNT;
  int64_t i = 0;
  for (; i + PAIR<A> <= n; i += PAIR<A>) {
    fetch<A>(next + i, stride);
    Vector<A> sum_first = load<A>(sums + i), sum_second = load<A>(sums + i + W);
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) {
      Vector<A> first, second;
      load_pair<A>(g + k * stride + i, first, second);
      sum_first += w[k] * first;
      sum_second += w[k] * second;
    }
    std::memcpy(sums + i, &sum_first, sizeof(sum_first));
    std::memcpy(sums + i + W, &sum_second, sizeof(sum_second));
  }
  for (; i < n; ++i) {
    for (int k = 0; k < COUNT; ++k) sums[i] += w[k] * widen<A>(g[k * stride + i]);
  }
}

// sums[0..n) += sum over all m rows of w[k] * g[k][0..n), for the n <= COLUMNS numbers of a tile.
template <typename G, typename A>
inline void add_all_rows(const G* g, int64_t stride, int64_t m, const A* w, A* sums, int64_t n) {
  int64_t row = 0;
  for (; row + STREAMS <= m; row += STREAMS) {
    const G* here = g + row * stride;
    const G* next = row + 2 * STREAMS <= m ? here + STREAMS * stride : g + COLUMNS;
    add_rows<STREAMS>(here, next, stride, w + row, sums, n);
  }
  for (; row < m; ++row) add_rows<1>(g + row * stride, g + COLUMNS, stride, w + row, sums, n);
}

}  // namespace mfac

// A tile of a small matrix in registers: where the kernels on blocks spend their time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "mfac_cpu.h"

namespace mfac {

// ROWS rows of two vectors each: half of the registers where there are 32 of 64 bytes, enough that additions need not wait.
template <typename A>
struct Tile {
  static constexpr int64_t WIDTH = 2 * Lanes<A>::COUNT;
  Vector<A> v[ROWS][2];
};

template <typename A>
inline void read(Tile<A>& t, const A* p, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    t.v[r][0] = load<A>(p + r * stride);
    t.v[r][1] = load<A>(p + r * stride + Lanes<A>::COUNT);
  }
}

template <typename A>
inline void write(const Tile<A>& t, A* p, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    std::memcpy(p + r * stride, &t.v[r][0], sizeof(Vector<A>));
    std::memcpy(p + r * stride + Lanes<A>::COUNT, &t.v[r][1], sizeof(Vector<A>));
  }
}

// t -= sum over k of left[k, 0..ROWS)^T right[k, 0..WIDTH), or += with PLUS; both operands have count rows, stride numbers apart.
template <bool PLUS, typename A>
inline void add_products(Tile<A>& t, const A* left, const A* right, int64_t count, int64_t stride) {
  for (int64_t k = 0; k < count; ++k, left += stride, right += stride) {
    const Vector<A> v0 = load<A>(right), v1 = load<A>(right + Lanes<A>::COUNT);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      if constexpr (PLUS) {
        t.v[r][0] += left[r] * v0;
        t.v[r][1] += left[r] * v1;
      } else {
        t.v[r][0] -= left[r] * v0;
        t.v[r][1] -= left[r] * v1;
      }
    }
  }
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory for rows of n numbers, with room for whole tiles at the end of each; aligned to cache lines, and zero at first. Rows are
// an odd number of lines apart: with a power of two they would share a few places of the cache.
template <typename A>
class Workspace {
 public:
  Workspace(int64_t n, int64_t rows)
      : stride((round_up(n, Tile<A>::WIDTH) / LANES + 2 | 1) * LANES), storage_(rows * stride + LINE / sizeof(A)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.data());
    data = storage_.data() + (round_up(address, LINE) - address) / sizeof(A);
  }

  A* data;
  int64_t stride;

 private:
  static constexpr int64_t LANES = LINE / sizeof(A);
  std::vector<A> storage_;
};

}  // namespace mfac

// A tile of a small matrix in registers: where the kernels on blocks spend their time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "mfac_cpu.h"

namespace mfac {

// R rows of V vectors each. The usual size takes half of the registers where there are 32 of 64 bytes, enough that additions need
// not wait; smaller tiles are for the edges of a matrix.
template <typename A, int R = ROWS, int V = 2>
struct Tile {
  static constexpr int64_t WIDTH = V * Lanes<A>::COUNT;
  Vector<A> v[R][V];
};

template <typename A, int R, int V>
inline void read(Tile<A, R, V>& t, const A* p, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) t.v[r][i] = load<A>(p + r * stride + i * Lanes<A>::COUNT);
  }
}

template <typename A, int R, int V>
inline void write(const Tile<A, R, V>& t, A* p, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) std::memcpy(p + r * stride + i * Lanes<A>::COUNT, &t.v[r][i], sizeof(Vector<A>));
  }
}

// t -= sum over k of left[k, 0..R)^T right[k, 0..WIDTH), or += with PLUS; both operands have count rows, stride numbers apart.
template <bool PLUS, typename A, int R, int V>
inline void add_products(Tile<A, R, V>& t, const A* left, const A* right, int64_t count, int64_t stride) {
  for (int64_t k = 0; k < count; ++k, left += stride, right += stride) {
    Vector<A> v[V];
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) v[i] = load<A>(right + i * Lanes<A>::COUNT);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) {
        if constexpr (PLUS) t.v[r][i] += left[r] * v[i];
        else t.v[r][i] -= left[r] * v[i];
      }
    }
  }
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory for rows of n numbers, and `room` more for a tile that begins in a row's last ones; aligned to cache lines, and zero at first.
// Rows are an odd number of lines apart: with a power of two they would share a few places of the cache.
template <typename A>
class Workspace {
 public:
  Workspace(int64_t n, int64_t rows, int64_t room = Tile<A>::WIDTH)
      : stride((round_up(n + room, LANES) / LANES | 1) * LANES), storage_(rows * stride + LINE / sizeof(A)) {
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

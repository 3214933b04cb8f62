// Vectors of the working precision, and how stored numbers are widened to it: what the CPU kernels have in common.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mfac {

// How much of a matrix a loop has in registers: ROWS rows of two vectors each (see mfac_cpu_tile.h).
#ifdef __AVX512F__
constexpr int BYTES = 64;  // of a vector: one register, or two of a processor with smaller ones
constexpr int ROWS = 8;
#else
constexpr int BYTES = 32;
constexpr int ROWS = 4;
#endif
constexpr int64_t LINE = 64;  // bytes of a cache line

struct BFloat16 {
  uint16_t bits;
};

// BYTES bytes of the working precision A, and as many numbers of the narrower types that are widened to it.
template <typename A>
struct Lanes {
  static constexpr int64_t COUNT = BYTES / sizeof(A);
  typedef A Vector __attribute__((vector_size(BYTES)));
  typedef float Floats __attribute__((vector_size(COUNT * 4)));
  typedef uint32_t Words __attribute__((vector_size(COUNT * 4)));
  typedef uint16_t Halves __attribute__((vector_size(COUNT * 2)));
};

template <typename A>
using Vector = typename Lanes<A>::Vector;

template <typename V>
inline V raw_load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Reads Lanes<A>::COUNT numbers and widens them to the working precision.
template <typename A, typename G>
inline Vector<A> load(const G* p) {
  if constexpr (std::is_same_v<A, G>) {
    return raw_load<Vector<A>>(p);
  } else {
    typename Lanes<A>::Floats values;
    if constexpr (std::is_same_v<G, BFloat16>) {
      const auto words = __builtin_convertvector(raw_load<typename Lanes<A>::Halves>(p), typename Lanes<A>::Words) << 16;
      values = reinterpret_cast<typename Lanes<A>::Floats>(words);
    } else {
      values = raw_load<typename Lanes<A>::Floats>(p);
    }
    if constexpr (std::is_same_v<A, float>) return values;
    else return __builtin_convertvector(values, Vector<A>);
  }
}

// Widens one number to the working precision.
template <typename A, typename G>
inline A widen(G value) {
  if constexpr (std::is_same_v<G, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return static_cast<A>(result);
  } else {
    return static_cast<A>(value);
  }
}

// Dot product of h numbers.
template <typename A, typename V>
inline double dot(const V* a, const A* x, int64_t h) {
  constexpr int64_t W = Lanes<A>::COUNT;
  Vector<A> sums = {};
  int64_t i = 0;
  for (; i + W <= h; i += W) sums += load<A>(a + i) * load<A>(x + i);
  double total = 0;
  for (int64_t lane = 0; lane < W; ++lane) total += sums[lane];
  for (; i < h; ++i) total += static_cast<double>(widen<A>(a[i])) * x[i];
  return total;
}

// out[0..h) += w * a[0..h)
template <typename A, typename V>
inline void add(A w, const V* a, A* out, int64_t h) {
  constexpr int64_t W = Lanes<A>::COUNT;
  int64_t i = 0;
  for (; i + W <= h; i += W) {
    const Vector<A> total = load<A>(out + i) + w * load<A>(a + i);
    std::memcpy(out + i, &total, sizeof(total));
  }
  for (; i < h; ++i) out[i] += w * widen<A>(a[i]);
}

}  // namespace mfac

// CPU kernels for the two passes over the gradient window: row_dots and combine (see mfac_hf/ops/window.py).
//
// Both read the window once and do two operations for each number, so memory bandwidth is the limit: the loops take several rows
// at a time, ask for the numbers of the next group of rows while they work on this one, read the vector from cache, and widen
// bfloat16 in registers. They are compiled for the machine that runs them.
//
// Each 32-bit word holds two bfloat16. A shift widens the first and a mask the second, which is half the work of spreading 16-bit
// numbers over a register (on a processor with registers of 32 bytes that took longer than memory). So one vector of a pair gets
// the even numbers of a run and the other the odd ones, and what is multiplied with them is brought into the same order first.
//
// Results do not depend on the number of threads: a thread has whole rows (row_dots) or whole columns (combine).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "mfac_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using namespace mfac;

namespace {

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

template <typename G, typename A>
void row_dots(const G* g, int64_t stride, int64_t m, int64_t d, const A* x, double* out) {
  const int64_t groups = (m + STREAMS - 1) / STREAMS;
  torch::stable::parallel_for(0, groups, 1, [=](int64_t begin, int64_t end) {
    std::vector<double> totals((end - begin) * STREAMS, 0.0);
    std::vector<A> placed(ALTERNATES<G, A> ? COLUMNS : 0);
    for (int64_t column = 0; column < d; column += COLUMNS) {
      const int64_t n = std::min(COLUMNS, d - column);
      const A* part = x + column;
      if constexpr (ALTERNATES<G, A>) {
        for (int64_t i = 0; i < n; ++i) placed[place_of<G, A>(i, n)] = part[i];
        part = placed.data();
      }
      for (int64_t group = begin; group < end; ++group) {
        // The last row stands in for missing ones: equal rows have equal products only if the same instructions made them.
        const G* rows[STREAMS];
        for (int64_t k = 0; k < STREAMS; ++k) rows[k] = g + std::min(group * STREAMS + k, m - 1) * stride + column;
        const G* next = group + 1 < end ? rows[0] + STREAMS * stride : g + begin * STREAMS * stride + column + COLUMNS;
        for (int64_t start = 0; start < n; start += RUN) {
          dot_run<G, A>(rows, next + start, stride, part + start, std::min(RUN, n - start), &totals[(group - begin) * STREAMS]);
          for (const G*& row : rows) row += RUN;
        }
      }
    }
    std::copy_n(totals.begin(), std::min(end * STREAMS, m) - begin * STREAMS, out + begin * STREAMS);
  });
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

template <typename G, typename A>
void combine(const G* g, int64_t stride, int64_t m, int64_t d, const A* w, const A* x, A alpha, A* out) {
  const int64_t tiles = (d + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, tiles, 1, [=](int64_t begin, int64_t end) {
    std::vector<A> sums(COLUMNS);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * COLUMNS;
      const int64_t n = std::min(COLUMNS, d - column);
      for (int64_t i = 0; i < n; ++i) sums[place_of<G, A>(i, n)] = x == nullptr ? A(0) : alpha * x[column + i];
      int64_t row = 0;
      for (; row + STREAMS <= m; row += STREAMS) {
        const G* here = g + row * stride + column;
        const G* next = row + 2 * STREAMS <= m ? here + STREAMS * stride : g + column + COLUMNS;
        add_rows<STREAMS>(here, next, stride, w + row, sums.data(), n);
      }
      for (; row < m; ++row) add_rows<1>(g + row * stride + column, g + column + COLUMNS, stride, w + row, sums.data(), n);
      for (int64_t i = 0; i < n; ++i) out[column + i] = sums[place_of<G, A>(i, n)];
    }
  });
}

// Contiguous copy of a vector in the working precision A.
template <typename A>
std::vector<A> vector_of(const Tensor& t) {
  const int64_t n = t.size(0), stride = t.stride(0);
  std::vector<A> result(n);
  if (t.scalar_type() == ScalarType::Double) {
    const double* p = static_cast<const double*>(t.data_ptr());
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<A>(p[i * stride]);
  } else {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "a vector is float32 or float64");
    const float* p = static_cast<const float*>(t.data_ptr());
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<A>(p[i * stride]);
  }
  return result;
}

void check_window(const Tensor& g) {
  STD_TORCH_CHECK(g.dim() == 2, "the window has ", g.dim(), " dimensions; expected a matrix (m, d)");
  STD_TORCH_CHECK(g.size(1) <= 1 || g.stride(1) == 1, "the columns of the window are ", g.stride(1),
                  " numbers apart; expected contiguous rows");
}

void check_vector(const Tensor& t, int64_t expected, const char* name, const char* of_window) {
  STD_TORCH_CHECK(t.dim() == 1, name, " has ", t.dim(), " dimensions; expected a vector");
  STD_TORCH_CHECK(t.size(0) == expected, name, " has ", t.size(0), " numbers; the window has ", expected, of_window);
}

// Calls f with a typed pointer to the window; a float64 window is always worked on in float64.
template <typename A, typename F>
void with_window(const Tensor& g, F f) {
  if (g.scalar_type() == ScalarType::Float) {
    f(static_cast<const float*>(g.data_ptr()));
  } else if (g.scalar_type() == ScalarType::BFloat16) {
    f(static_cast<const BFloat16*>(g.data_ptr()));
  } else {
    STD_TORCH_CHECK(g.scalar_type() == ScalarType::Double, "the window is float32, bfloat16 or float64");
    if constexpr (std::is_same_v<A, double>) f(static_cast<const double*>(g.data_ptr()));
  }
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

Tensor row_dots_cpu(const Tensor& g, const Tensor& x) {
  check_window(g);
  const int64_t m = g.size(0), d = g.size(1);
  check_vector(x, d, "x", " columns");
  Tensor out = torch::stable::new_empty(g, {m}, ScalarType::Double);
  double* result = static_cast<double*>(out.data_ptr());
  auto run = [&](auto working) {
    using A = decltype(working);
    const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const bool direct = (x.stride(0) == 1 || d <= 1) && x.scalar_type() == type;
    const std::vector<A> copy = direct ? std::vector<A>() : vector_of<A>(x);
    const A* values = direct ? static_cast<const A*>(x.data_ptr()) : copy.data();
    with_window<A>(g, [&](auto* p) { row_dots(p, g.stride(0), m, d, values, result); });
  };
  if (is_double(g) || is_double(x)) run(double{});
  else run(float{});
  return out;
}

Tensor combine_cpu(const Tensor& g, const Tensor& w, const std::optional<Tensor>& x, double alpha, double beta) {
  check_window(g);
  const int64_t m = g.size(0), d = g.size(1);
  check_vector(w, m, "weights", " rows");
  if (x) check_vector(*x, d, "x", " columns");
  const bool wide = is_double(g) || (x && is_double(*x));
  Tensor out = torch::stable::new_empty(g, {d}, wide ? ScalarType::Double : ScalarType::Float);
  auto run = [&](auto working) {
    using A = decltype(working);
    std::vector<double> scaled = vector_of<double>(w);
    std::vector<A> weights(m);
    for (int64_t i = 0; i < m; ++i) weights[i] = static_cast<A>(beta * scaled[i]);
    const std::vector<A> vector = x ? vector_of<A>(*x) : std::vector<A>();
    with_window<A>(g, [&](auto* p) {
      combine(p, g.stride(0), m, d, weights.data(), x ? vector.data() : nullptr, static_cast<A>(alpha),
              static_cast<A*>(out.data_ptr()));
    });
  };
  if (wide) run(double{});
  else run(float{});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) {
  m.impl("row_dots", TORCH_BOX(&row_dots_cpu));
  m.impl("combine", TORCH_BOX(&combine_cpu));
}

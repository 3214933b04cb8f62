// CPU kernels for the two passes over the gradient window: row_dots and combine (see mfac_hf/ops.py).
//
// Both read the window once and do two operations per number, so memory bandwidth is the limit: the loops keep several rows in
// flight, touch the vector from cache, and widen bfloat16 in registers. Compiled for the machine that runs it.
//
// Results do not depend on the number of threads: a thread has whole rows (row_dots) or whole columns (combine).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "mfac_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using namespace mfac;

namespace {

constexpr int64_t RUN = 2048;       // columns summed in the working precision before they are added in float64
constexpr int64_t TILE = 8 * RUN;   // columns read of a group of rows before the next group
constexpr int64_t COLUMNS = 4096;   // columns of the result kept in cache by combine
constexpr int64_t AHEAD = 1024;     // bytes of a row asked for before they are needed

// Ask for the n numbers at p + AHEAD bytes. Never faults, also beyond the end of the window.
template <typename G>
inline void fetch(const G* p, int64_t n) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + AHEAD;
#pragma GCC unroll 4
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(G)); byte += LINE) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + byte));
  }
}

// totals[k] += dot product of the n numbers at g[k] with x, for COUNT rows; n <= RUN, summed in the working precision A.
template <int COUNT, typename G, typename A>
inline void dot_run(const G* const* g, const A* x, int64_t n, double* totals) {
  constexpr int64_t W = Lanes<A>::COUNT;
  Vector<A> sums[COUNT][SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS * W <= n; i += SUMS * W) {
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) fetch(g[k] + i, SUMS * W);
#pragma GCC unroll 8
    for (int j = 0; j < SUMS; ++j) {
      const Vector<A> v = load<A>(x + i + j * W);
#pragma GCC unroll 8
      for (int k = 0; k < COUNT; ++k) sums[k][j] += load<A>(g[k] + i + j * W) * v;
    }
  }
  for (int k = 0; k < COUNT; ++k) {
    double total = 0;
    for (int j = 0; j < SUMS; ++j) {
      for (int64_t lane = 0; lane < W; ++lane) total += sums[k][j][lane];
    }
    for (int64_t j = i; j < n; ++j) total += static_cast<double>(widen<A>(g[k][j])) * x[j];
    totals[k] += total;
  }
}

template <int COUNT, typename G, typename A>
inline void dot_tile(const G* g, int64_t stride, const A* x, int64_t n, double* totals) {
  for (int64_t start = 0; start < n; start += RUN) {
    const G* rows[COUNT];
    for (int k = 0; k < COUNT; ++k) rows[k] = g + k * stride + start;
    dot_run<COUNT, G, A>(rows, x + start, std::min(RUN, n - start), totals);
  }
}

template <typename G, typename A>
void row_dots(const G* g, int64_t stride, int64_t m, int64_t d, const A* x, double* out) {
  const int64_t groups = (m + ROWS - 1) / ROWS;
  torch::stable::parallel_for(0, groups, 1, [=](int64_t begin, int64_t end) {
    std::fill(out + begin * ROWS, out + std::min(end * ROWS, m), 0.0);
    for (int64_t column = 0; column < d; column += TILE) {
      const int64_t n = std::min(TILE, d - column);
      for (int64_t row = begin * ROWS; row < std::min(end * ROWS, m); row += ROWS) {
        if (row + ROWS <= m) {
          dot_tile<ROWS, G, A>(g + row * stride + column, stride, x + column, n, out + row);
        } else {
          for (int64_t k = row; k < m; ++k) dot_tile<1, G, A>(g + k * stride + column, stride, x + column, n, out + k);
        }
      }
    }
  });
}

// out[0..n) += sum over COUNT rows of w[k] * g[k][0..n)
template <int COUNT, typename G, typename A>
inline void add_rows(const G* const* g, const A* w, A* out, int64_t n) {
  constexpr int64_t W = Lanes<A>::COUNT;
  int64_t i = 0;
  for (; i + SUMS * W <= n; i += SUMS * W) {
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) fetch(g[k] + i, SUMS * W);
#pragma GCC unroll 8
    for (int j = 0; j < SUMS; ++j) {
      Vector<A> total = load<A>(out + i + j * W);
#pragma GCC unroll 8
      for (int k = 0; k < COUNT; ++k) total += w[k] * load<A>(g[k] + i + j * W);
      std::memcpy(out + i + j * W, &total, sizeof(total));
    }
  }
  for (; i < n; ++i) {
    for (int k = 0; k < COUNT; ++k) out[i] += w[k] * widen<A>(g[k][i]);
  }
}

template <typename G, typename A>
void combine(const G* g, int64_t stride, int64_t m, int64_t d, const A* w, const A* x, A alpha, A* out) {
  const int64_t tiles = (d + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, tiles, 1, [=](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * COLUMNS;
      const int64_t n = std::min(COLUMNS, d - column);
      A* target = out + column;
      for (int64_t i = 0; i < n; ++i) target[i] = x == nullptr ? A(0) : alpha * x[column + i];
      int64_t row = 0;
      for (; row + ROWS <= m; row += ROWS) {
        const G* rows[ROWS];
        for (int64_t k = 0; k < ROWS; ++k) rows[k] = g + (row + k) * stride + column;
        add_rows<ROWS>(rows, w + row, target, n);
      }
      for (; row < m; ++row) {
        const G* rows[1] = {g + row * stride + column};
        add_rows<1>(rows, w + row, target, n);
      }
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
    const bool direct = (x.stride(0) == 1 || d <= 1) && x.scalar_type() == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
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
      combine(p, g.stride(0), m, d, weights.data(), x ? vector.data() : nullptr, static_cast<A>(alpha), static_cast<A*>(out.data_ptr()));
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

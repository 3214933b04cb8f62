// CPU kernels for the two passes over the gradient window: row_dots and combine (see mfac_hf/ops/window.py).
//
// Both read the window once and do two operations for each number, so memory bandwidth is the limit: the loops take several rows
// at a time, ask for the numbers of the next group of rows while they work on this one, read the vector from cache, and widen
// bfloat16 in registers. They are compiled for the machine that runs them.
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

#include "mfac_cpu_rows.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using namespace mfac;

namespace {

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

template <typename G, typename A>
void combine(const G* g, int64_t stride, int64_t m, int64_t d, const A* w, const A* x, A alpha, A* out) {
  const int64_t tiles = (d + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, tiles, 1, [=](int64_t begin, int64_t end) {
    std::vector<A> sums(COLUMNS);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * COLUMNS;
      const int64_t n = std::min(COLUMNS, d - column);
      for (int64_t i = 0; i < n; ++i) sums[place_of<G, A>(i, n)] = x == nullptr ? A(0) : alpha * x[column + i];
      add_all_rows(g + column, stride, m, w, sums.data(), n);
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

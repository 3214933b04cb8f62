// CPU kernels for the two passes over the gradient window: row_dots and combine (see mfac_hf/ops.py).
//
// Both read the window once and do two operations per number, so memory bandwidth is the limit: the loops keep several rows in
// flight, touch the vector from cache, and widen bfloat16 in registers. Compiled for the machine that runs it; every inner loop
// has a fixed number of independent lanes, which the compiler turns into vector instructions without reordering any sum.
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t LANES = 32;        // independent partial sums of a dot product
constexpr int64_t RUN = 2048;        // columns summed in the working precision before they are added in float64
constexpr int64_t TILE = 8 * RUN;    // columns of the vector kept in cache while rows pass by
constexpr int64_t ROWS = 4;          // rows of the window read at the same time
constexpr int64_t COLUMNS = 4096;    // columns of the result kept in cache by combine

struct BFloat16 {
  uint16_t bits;
};

template <typename A>
inline A widen(float value) {
  return static_cast<A>(value);
}
template <typename A>
inline A widen(double value) {
  return static_cast<A>(value);
}
template <typename A>
inline A widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return static_cast<A>(result);
}

// Dot product of n numbers, n <= RUN, in the working precision A.
template <typename G, typename A>
inline double dot_run(const G* __restrict g, const A* __restrict x, int64_t n) {
  A lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) lanes[k] += widen<A>(g[i + k]) * x[i + k];
  }
  double total = 0;
  for (; i < n; ++i) total += static_cast<double>(widen<A>(g[i])) * x[i];
  for (int64_t k = 0; k < LANES; ++k) total += lanes[k];
  return total;
}

template <typename G, typename A>
void row_dots(const G* g, int64_t stride, int64_t m, int64_t d, const A* x, double* out) {
  torch::stable::parallel_for(0, m, 1, [=](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0);
    for (int64_t column = 0; column < d; column += TILE) {
      const int64_t stop = std::min(column + TILE, d);
      for (int64_t row = begin; row < end; ++row) {
        const G* source = g + row * stride;
        double total = 0;
        for (int64_t c = column; c < stop; c += RUN) total += dot_run<G, A>(source + c, x + c, std::min(RUN, stop - c));
        out[row] += total;
      }
    }
  });
}

// out[0..n) += sum over COUNT rows of w[k] * g[k][0..n)
template <int COUNT, typename G, typename A>
inline void add_rows(const G* const* g, const A* w, A* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    A total = out[i];
    for (int k = 0; k < COUNT; ++k) total += w[k] * widen<A>(g[k][i]);
    out[i] = total;
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
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "expected a float32 or float64 vector");
    const float* p = static_cast<const float*>(t.data_ptr());
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<A>(p[i * stride]);
  }
  return result;
}

void check_window(const Tensor& g) {
  STD_TORCH_CHECK(g.dim() == 2, "the window is a matrix (m, d)");
  STD_TORCH_CHECK(g.size(1) <= 1 || g.stride(1) == 1, "the columns of the window are contiguous");
}

// Calls f with a typed pointer to the window.
template <typename F>
void with_window(const Tensor& g, F f) {
  switch (g.scalar_type()) {
    case ScalarType::Float: f(static_cast<const float*>(g.data_ptr())); break;
    case ScalarType::BFloat16: f(static_cast<const BFloat16*>(g.data_ptr())); break;
    case ScalarType::Double: f(static_cast<const double*>(g.data_ptr())); break;
    default: STD_TORCH_CHECK(false, "the window is float32, bfloat16 or float64");
  }
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

Tensor row_dots_cpu(const Tensor& g, const Tensor& x) {
  check_window(g);
  const int64_t m = g.size(0), d = g.size(1);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == d, "the vector has as many numbers as the window has columns");
  Tensor out = torch::stable::new_empty(g, {m}, ScalarType::Double);
  double* result = static_cast<double*>(out.data_ptr());
  auto run = [&](auto working) {
    using A = decltype(working);
    const bool direct = (x.stride(0) == 1 || d <= 1) && x.scalar_type() == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    const std::vector<A> copy = direct ? std::vector<A>() : vector_of<A>(x);
    const A* values = direct ? static_cast<const A*>(x.data_ptr()) : copy.data();
    with_window(g, [&](auto* p) { row_dots(p, g.stride(0), m, d, values, result); });
  };
  if (is_double(g) || is_double(x)) run(double{});
  else run(float{});
  return out;
}

Tensor combine_cpu(const Tensor& g, const Tensor& w, const std::optional<Tensor>& x, double alpha, double beta) {
  check_window(g);
  const int64_t m = g.size(0), d = g.size(1);
  STD_TORCH_CHECK(w.dim() == 1 && w.size(0) == m, "one weight for each row of the window");
  STD_TORCH_CHECK(!x || (x->dim() == 1 && x->size(0) == d), "the vector has as many numbers as the window has columns");
  const bool wide = is_double(g) || (x && is_double(*x));
  Tensor out = torch::stable::new_empty(g, {d}, wide ? ScalarType::Double : ScalarType::Float);
  auto run = [&](auto working) {
    using A = decltype(working);
    std::vector<double> scaled = vector_of<double>(w);
    std::vector<A> weights(m);
    for (int64_t i = 0; i < m; ++i) weights[i] = static_cast<A>(beta * scaled[i]);
    const std::vector<A> vector = x ? vector_of<A>(*x) : std::vector<A>();
    with_window(g, [&](auto* p) {
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

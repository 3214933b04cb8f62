// CPU kernels for the passes over the window in Adam's metric: metric_push, metric_combine and metric_move (see
// mfac_hf/ops/metric.py).
//
// A tile of columns stays in cache from the gradient to the products: metric_push reads the gradient and the second moment once,
// metric_combine scales the sums where they lie, and metric_move takes them to the parameters. The window is read once, as by
// row_dots and combine. Gradients and parameters are pieces, side by side in the columns, which are read and moved where they lie.
//
// Results do not depend on the number of threads: a thread has whole tiles, and the products of tiles are added up in their order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "mfac_cpu_rows.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using namespace mfac;

namespace {

// The type of products: float64 where the window or the moment is.
template <typename G, typename V>
using Working = std::conditional_t<std::is_same_v<G, double> || std::is_same_v<V, double>, double, float>;

// Rounds a number to the type of the window.
template <typename G, typename A>
inline G narrow(A value) {
  if constexpr (std::is_same_v<G, BFloat16>) {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to the nearest, ties to even
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16)};
  } else {
    return static_cast<G>(value);
  }
}

// Takes n numbers of a gradient into the moment, and stores them scaled.
template <typename G, typename V>
inline void take(const V* __restrict grad, V* __restrict moment, G* __restrict row, int64_t n, V rate, V eps) {
  for (int64_t i = 0; i < n; ++i) {
    const V square = grad[i] * grad[i];
    moment[i] += rate * (square - moment[i]);
    row[i] = narrow<G>(grad[i] / std::sqrt(std::sqrt(moment[i]) + eps));
  }
}

// Tensors that lie side by side in the columns.
template <typename V>
class Pieces {
 public:
  explicit Pieces(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      data_.push_back(static_cast<V*>(tensor.data_ptr()));
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) + tensor.numel());
    }
  }

  // Calls f(piece, pointer, offset, count) for the runs that make up n columns from `column` on; offset counts from there.
  template <typename F>
  void over(int64_t column, int64_t n, F f) const {
    const int64_t stop = column + n;
    size_t piece = std::upper_bound(ends_.begin(), ends_.end(), column) - ends_.begin();
    for (int64_t at = column; at < stop; ++piece) {
      const int64_t begin = piece == 0 ? 0 : ends_[piece - 1], end = std::min(ends_[piece], stop);
      if (end > at) f(piece, data_[piece] + (at - begin), at - column, end - at);
      at = std::max(at, end);
    }
  }

 private:
  std::vector<V*> data_;
  std::vector<int64_t> ends_;
};

template <typename G, typename V>
void push(G* g, int64_t stride, int64_t d, const Pieces<V>& grads, V* moment, int64_t row, int64_t count, V rate, V eps, double* out) {
  using A = Working<G, V>;
  const int64_t tiles = (d + COLUMNS - 1) / COLUMNS, groups = (count + STREAMS - 1) / STREAMS;
  std::vector<double> products(tiles * groups * STREAMS, 0.0);
  double* const all = products.data();
  torch::stable::parallel_for(0, tiles, 1, [=, &grads](int64_t begin, int64_t end) {
    std::vector<A> placed(COLUMNS);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * COLUMNS;
      const int64_t n = std::min(COLUMNS, d - column);
      G* const stored = g + row * stride + column;
      grads.over(column, n, [&](size_t, const V* grad, int64_t at, int64_t run) {
        take(grad, moment + column + at, stored + at, run, rate, eps);
      });
      for (int64_t i = 0; i < n; ++i) placed[place_of<G, A>(i, n)] = widen<A>(stored[i]);
      double* const totals = all + tile * groups * STREAMS;
      for (int64_t group = 0; group < groups; ++group) {
        // The last row stands in for missing ones: equal rows have equal products only if the same instructions made them.
        const G* rows[STREAMS];
        for (int64_t k = 0; k < STREAMS; ++k) rows[k] = g + std::min(group * STREAMS + k, count - 1) * stride + column;
        const G* next = group + 1 < groups ? rows[0] + STREAMS * stride : g + column + COLUMNS;
        for (int64_t start = 0; start < n; start += RUN) {
          dot_run<G, A>(rows, next + start, stride, placed.data() + start, std::min(RUN, n - start), totals + group * STREAMS);
          for (const G*& each : rows) each += RUN;
        }
      }
    }
  });
  std::fill_n(out, count, 0.0);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t i = 0; i < count; ++i) out[i] += all[tile * groups * STREAMS + i];
  }
}

// Calls finish(column, sums, n) for each tile of the combination, whose numbers are in their places and in type V.
template <typename G, typename A, typename V, typename F>
void combine(const G* g, int64_t stride, int64_t m, int64_t d, const A* w, const V* moment, V eps, F finish) {
  const int64_t tiles = (d + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, tiles, 1, [=, &finish](int64_t begin, int64_t end) {
    std::vector<A> sums(COLUMNS);
    std::vector<V> ordered(COLUMNS);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * COLUMNS;
      const int64_t n = std::min(COLUMNS, d - column);
      std::fill_n(sums.begin(), n, A(0));
      add_all_rows(g + column, stride, m, w, sums.data(), n);
      for (int64_t i = 0; i < n; ++i) ordered[i] = static_cast<V>(sums[place_of<G, A>(i, n)]);
      const V* const part = moment + column;
      V* const result = ordered.data();
      for (int64_t i = 0; i < n; ++i) result[i] /= std::sqrt(std::sqrt(part[i]) + eps);
      finish(column, result, n);
    }
  });
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void check_operands(const Tensor& g, const Tensor& moment, double eps) {
  STD_TORCH_CHECK(g.dim() == 2 && (g.size(1) <= 1 || g.stride(1) == 1), "expected a window (m, d) of contiguous rows");
  STD_TORCH_CHECK(is_double(moment) || moment.scalar_type() == ScalarType::Float, "the second moment's type is not float32 or float64");
  STD_TORCH_CHECK(moment.dim() == 1 && moment.size(0) == g.size(1) && moment.is_contiguous(), "the second moment has ",
                  moment.numel(), " numbers; the window has ", g.size(1), " columns");
  STD_TORCH_CHECK(eps > 0, "eps is ", eps, "; expected a number above 0");
}

// Calls f with typed pointers to the window and the moment.
template <typename F>
void with_types(const Tensor& g, const Tensor& moment, F f) {
  auto with_moment = [&](auto* window) {
    if (is_double(moment)) f(window, static_cast<double*>(moment.data_ptr()));
    else f(window, static_cast<float*>(moment.data_ptr()));
  };
  if (is_double(g)) return with_moment(static_cast<double*>(g.data_ptr()));
  if (g.scalar_type() == ScalarType::BFloat16) return with_moment(static_cast<BFloat16*>(g.data_ptr()));
  STD_TORCH_CHECK(g.scalar_type() == ScalarType::Float, "the window is float32, bfloat16 or float64");
  with_moment(static_cast<float*>(g.data_ptr()));
}

void check_pieces(const std::vector<Tensor>& pieces, const Tensor& moment, const char* what) {
  int64_t numbers = 0;
  for (const Tensor& piece : pieces) {
    STD_TORCH_CHECK(piece.scalar_type() == moment.scalar_type(), "the type of ", what, " is not that of the second moment");
    numbers += piece.numel();
  }
  STD_TORCH_CHECK(numbers == moment.numel(), what, " has ", numbers, " numbers; the window has ", moment.numel(), " columns");
}

Tensor metric_push_cpu(const Tensor& g, const std::vector<Tensor>& grads, const Tensor& moment, int64_t row, int64_t count, double rate,
                       double eps) {
  check_operands(g, moment, eps);
  check_pieces(grads, moment, "the gradient");
  STD_TORCH_CHECK(0 <= row && row < count && count <= g.size(0), "row ", row, " of ", count, "; expected 0 <= row < count <= ",
                  g.size(0));
  std::vector<Tensor> vectors;
  for (const Tensor& grad : grads) vectors.push_back(torch::stable::contiguous(grad));
  Tensor out = torch::stable::new_empty(g, {count}, ScalarType::Double);
  with_types(g, moment, [&](auto* window, auto* second) {
    using V = std::remove_pointer_t<decltype(second)>;
    push(window, g.stride(0), g.size(1), Pieces<V>(vectors), second, row, count, static_cast<V>(rate), static_cast<V>(eps),
         static_cast<double*>(out.data_ptr()));
  });
  return out;
}

// Calls finish(column, sums, n, working type's second moment) for each tile of the scaled combination.
template <typename F>
void combine_tiles(const Tensor& g, const Tensor& weights, const Tensor& moment, double eps, bool wide, F with_finish) {
  check_operands(g, moment, eps);
  const int64_t m = g.size(0);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == m && is_double(weights), "expected a float64 weight for each of the ", m,
                  " rows");
  const Tensor vector = torch::stable::contiguous(weights);
  const double* const given = static_cast<const double*>(vector.data_ptr());
  with_types(g, moment, [&](auto* window, auto* second) {
    using G = std::remove_pointer_t<decltype(window)>;
    using V = std::remove_pointer_t<decltype(second)>;
    const auto finish = with_finish(V{});
    auto run = [&](auto working) {
      using A = decltype(working);
      const std::vector<A> w(given, given + m);
      combine<G, A, V>(window, g.stride(0), m, g.size(1), w.data(), second, static_cast<V>(eps), finish);
    };
    if constexpr (std::is_same_v<Working<G, V>, double>) run(double{});
    else if (wide) run(double{});
    else run(float{});
  });
}

Tensor metric_combine_cpu(const Tensor& g, const Tensor& weights, const Tensor& moment, double eps, bool wide) {
  Tensor out = torch::stable::new_empty(moment, {moment.numel()});
  combine_tiles(g, weights, moment, eps, wide, [&](auto number) {
    using V = decltype(number);
    V* const result = static_cast<V*>(out.data_ptr());
    return [result](int64_t column, const V* sums, int64_t n) { std::copy_n(sums, n, result + column); };
  });
  return out;
}

void metric_move_cpu(const Tensor& g, const Tensor& weights, const Tensor& moment, double eps, bool wide,
                     const std::vector<Tensor>& parameters, const std::vector<double>& factors, const std::vector<double>& rates) {
  check_pieces(parameters, moment, "the list of parameters");
  STD_TORCH_CHECK(factors.size() == parameters.size() && rates.size() == parameters.size(), parameters.size(), " parameters, ",
                  factors.size(), " factors and ", rates.size(), " rates; expected as many of each");
  for (const Tensor& parameter : parameters) STD_TORCH_CHECK(parameter.is_contiguous(), "a parameter is not contiguous");
  combine_tiles(g, weights, moment, eps, wide, [&](auto number) {
    using V = decltype(number);
    return [&, pieces = Pieces<V>(parameters)](int64_t column, const V* sums, int64_t n) {
      pieces.over(column, n, [&](size_t piece, V* parameter, int64_t at, int64_t run) {
        const V factor = static_cast<V>(factors[piece]), rate = static_cast<V>(rates[piece]);
        for (int64_t i = 0; i < run; ++i) parameter[i] = factor * parameter[i] - rate * sums[at + i];
      });
    };
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) {
  m.impl("metric_push", TORCH_BOX(&metric_push_cpu));
  m.impl("metric_combine", TORCH_BOX(&metric_combine_cpu));
  m.impl("metric_move", TORCH_BOX(&metric_move_cpu));
}

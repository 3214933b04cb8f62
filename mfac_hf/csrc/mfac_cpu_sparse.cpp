// CPU kernels for gradients stored by their non-zero table rows: sparse_dots and sparse_combine (see mfac_hf/ops/rows.py).
//
// A look-up table says where a table row stands in the vector or in the result, so that no row numbers have to be compared.
// sparse_dots walks through the stored rows in the order of memory, sparse_combine in the order of the result.
//
// Results do not depend on the number of threads: a thread has whole gradients (sparse_dots) or whole rows of the result
// (sparse_combine), which it adds up in the order of the gradients.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "mfac_cpu.h"

using namespace mfac;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t AHEAD = 8;  // the values of a slot are prefetched so many slots ahead

// The m gradients, of n slots with h numbers each. A slot meets row place[rows[slot]] of the other operand or of the result, or
// none where that is negative.
template <typename V>
struct Stored {
  const int64_t* rows;
  const V* values;
  const int64_t* place;
  int64_t m, n, h;
};

template <typename A, typename V>
void dots(const Stored<V>& g, const A* x, double* out) {
  torch::stable::parallel_for(0, g.m, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = 0;
      for (int64_t slot = i * g.n; slot < (i + 1) * g.n; ++slot) {
        const int64_t place = g.place[g.rows[slot]];
        if (place >= 0) out[i] += dot<A>(g.values + slot * g.h, x + place * g.h, g.h);
      }
    }
  });
}

// Groups the slots by their place (a counting sort, which keeps the order of the gradients), so that a row of the result stays in
// cache until it is whole. In the order of memory the rows of the result were fetched anew for each addition.
template <typename A, typename V>
void combine(const Stored<V>& g, const A* w, int64_t count, A* out) {
  std::vector<int64_t> starts(count + 1, 0);
  for (int64_t slot = 0; slot < g.m * g.n; ++slot) {
    const int64_t place = g.place[g.rows[slot]];
    if (place >= 0) ++starts[place + 1];
  }
  for (int64_t place = 0; place < count; ++place) starts[place + 1] += starts[place];
  std::vector<int64_t> slots(starts[count]), next(starts.begin(), starts.end() - 1);
  for (int64_t slot = 0; slot < g.m * g.n; ++slot) {
    const int64_t place = g.place[g.rows[slot]];
    if (place >= 0) slots[next[place]++] = slot;
  }
  std::fill(out, out + count * g.h, A(0));
  const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads()), total = starts[count];
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    // Each part gets about as many slots, not as many rows of the result: a few rows have most of the slots.
    const auto row_at = [&](int64_t part) {
      return std::lower_bound(starts.begin(), starts.end() - 1, total * part / parts) - starts.begin();
    };
    for (int64_t place = row_at(begin); place < (end == parts ? count : row_at(end)); ++place) {
      for (int64_t e = starts[place]; e < starts[place + 1]; ++e) {
        if (e + AHEAD < total) {
          const char* later = reinterpret_cast<const char*>(g.values + slots[e + AHEAD] * g.h);
          for (int64_t byte = 0; byte < g.h * static_cast<int64_t>(sizeof(V)); byte += LINE) __builtin_prefetch(later + byte);
        }
        add(w[slots[e] / g.n], g.values + slots[e] * g.h, out + place * g.h, g.h);
      }
    }
  });
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_double(t) || t.scalar_type() == ScalarType::Float, name, " are float32 or float64");
}

void check_range(const Tensor& t, int64_t low, int64_t high, const char* name) {
  const int64_t* p = static_cast<const int64_t*>(t.data_ptr());
  int64_t least = low, most = low;
  for (int64_t i = 0; i < t.numel(); ++i) {
    least = std::min(least, p[i]);
    most = std::max(most, p[i]);
  }
  STD_TORCH_CHECK(least >= low && most < std::max(high, low + 1), name, " go from ", least, " to ", most, "; expected ", low, " to ",
                  high - 1);
}

// Checks everything that an address is computed from, and calls f with the stored gradients.
template <typename F>
void with_stored(const Tensor& rows, const Tensor& values, const Tensor& place, int64_t count, F f) {
  STD_TORCH_CHECK(rows.dim() == 2 && values.dim() == 3 && place.dim() == 1,
                  "expected row numbers (m, n), values (m, n, h) and places (v + 1,); they have ", rows.dim(), ", ", values.dim(), " and ",
                  place.dim(), " dimensions");
  STD_TORCH_CHECK(rows.size(0) == values.size(0) && rows.size(1) == values.size(1), "row numbers for ", rows.size(0), " x ", rows.size(1),
                  " slots; there are values for ", values.size(0), " x ", values.size(1));
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && place.scalar_type() == ScalarType::Long, "row numbers and places are int64");
  STD_TORCH_CHECK(rows.is_contiguous() && values.is_contiguous() && place.is_contiguous(), "expected contiguous tensors");
  check_float(values, "values");
  check_range(rows, 0, place.numel(), "row numbers");
  check_range(place, -1, count, "places");
  const int64_t *r = static_cast<const int64_t*>(rows.data_ptr()), *p = static_cast<const int64_t*>(place.data_ptr());
  const int64_t m = rows.size(0), n = rows.size(1), h = values.size(2);
  if (is_double(values)) f(Stored<double>{r, static_cast<const double*>(values.data_ptr()), p, m, n, h});
  else f(Stored<float>{r, static_cast<const float*>(values.data_ptr()), p, m, n, h});
}

Tensor sparse_dots_cpu(const Tensor& rows, const Tensor& values, const Tensor& place, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && values.dim() == 3 && x.size(1) == values.size(2) && x.is_contiguous(),
                  "expected a contiguous x whose rows are as wide as the values");
  check_float(x, "the numbers of x");
  Tensor out = torch::stable::new_empty(values, {values.size(0)}, ScalarType::Double);
  double* result = static_cast<double*>(out.data_ptr());
  with_stored(rows, values, place, x.size(0), [&](auto g) {
    if (is_double(x)) {
      dots(g, static_cast<const double*>(x.data_ptr()), result);
    } else if constexpr (std::is_same_v<decltype(g), Stored<float>>) {
      dots(g, static_cast<const float*>(x.data_ptr()), result);
    } else {
      const float* p = static_cast<const float*>(x.data_ptr());
      dots(g, std::vector<double>(p, p + x.numel()).data(), result);
    }
  });
  return out;
}

Tensor sparse_combine_cpu(const Tensor& rows, const Tensor& values, const Tensor& place, const Tensor& weights, int64_t count) {
  STD_TORCH_CHECK(values.dim() == 3 && weights.dim() == 1 && weights.size(0) == values.size(0) && weights.is_contiguous(),
                  "expected one weight for each of the gradients, contiguous");
  STD_TORCH_CHECK(count >= 0, "count is ", count, "; expected the rows of the result");
  check_float(weights, "weights");
  const bool wide = is_double(values) || is_double(weights);
  Tensor out = torch::stable::new_empty(values, {count, values.size(2)}, wide ? ScalarType::Double : ScalarType::Float);
  with_stored(rows, values, place, count, [&](auto g) {
    if (is_double(weights)) {
      combine(g, static_cast<const double*>(weights.data_ptr()), count, static_cast<double*>(out.data_ptr()));
    } else if constexpr (std::is_same_v<decltype(g), Stored<float>>) {
      combine(g, static_cast<const float*>(weights.data_ptr()), count, static_cast<float*>(out.data_ptr()));
    } else {
      const float* p = static_cast<const float*>(weights.data_ptr());
      combine(g, std::vector<double>(p, p + weights.numel()).data(), count, static_cast<double*>(out.data_ptr()));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) {
  m.impl("sparse_dots", TORCH_BOX(&sparse_dots_cpu));
  m.impl("sparse_combine", TORCH_BOX(&sparse_combine_cpu));
}

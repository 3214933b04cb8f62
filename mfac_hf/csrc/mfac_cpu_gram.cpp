// CPU kernels for sums of outer products in blocks: add_gram and unpack_gram (see mfac_hf/ops/blocks.py).
//
// A few gradients at a time are widened to float64, for a few neighbouring blocks. They stay in a core's own cache until all
// tiles on and below the diagonal have taken their products in registers. The sums, rows of the lower triangle one after the
// other, are read and written once at the end.
//
// Results do not depend on the number of threads: a thread has whole blocks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "mfac_cpu_tile.h"

using namespace mfac;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t RUN = 64;       // gradients at a time: a block of 50 columns stays in the first cache meanwhile
constexpr int64_t COLUMNS = 256;  // about how many, over neighbouring blocks: what is read of a gradient at once

int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// out[0..n) = a[0..n), in float64
template <typename G>
inline void widen_row(const G* a, double* out, int64_t n) {
  constexpr int64_t W = Lanes<double>::COUNT;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vector<double> values = load<double>(a + i);
    std::memcpy(out + i, &values, sizeof(values));
  }
  for (; i < n; ++i) out[i] = widen<double>(a[i]);
}

template <int R, int V>
inline void add_tile(const double* block, int64_t p, int64_t c, int64_t run, int64_t stride, double* target, int64_t total_stride) {
  Tile<double, R, V> t;
  read(t, target + c, total_stride);
  add_products<true>(t, block + p, block + c, run, stride);
  write(t, target + c, total_stride);
}

// Adds the products of rows p to p + R with all columns up to the diagonal.
template <int R>
inline void add_rows(const double* block, int64_t p, int64_t run, int64_t stride, double* totals, int64_t total_stride) {
  constexpr int64_t W = Lanes<double>::COUNT;
  double* target = totals + p * total_stride;
  int64_t c = 0;
  for (; c + W < p + R; c += 2 * W) add_tile<R, 2>(block, p, c, run, stride, target, total_stride);
  if (c < p + R) add_tile<R, 1>(block, p, c, run, stride, target, total_stride);
}

template <typename G>
void add_gram(double* sums, int64_t size, const G* g, int64_t grad_stride, int64_t n, int64_t d) {
  const int64_t blocks = (d + size - 1) / size, rows = round_up(size, ROWS), group = std::max<int64_t>(1, COLUMNS / size);
  const int64_t length = triangle(size);
  torch::stable::parallel_for(0, (blocks + group - 1) / group, 1, [=](int64_t begin, int64_t end) {
    Workspace<double> gradients(size, group * RUN, 0), totals(size, group * rows, 0);  // no tile goes beyond its rows
    for (int64_t first = begin * group; first < std::min(end * group, blocks); first += group) {
      const int64_t count = std::min(group, blocks - first);
      std::fill(totals.data, totals.data + count * rows * totals.stride, 0.0);
      for (int64_t k = 0; k < n; k += RUN) {
        const int64_t run = std::min(RUN, n - k);
        for (int64_t i = 0; i < run; ++i) {
          for (int64_t b = 0; b < count; ++b) {
            const int64_t column = (first + b) * size, there = std::min(size, d - column);
            double* row = gradients.data + (b * RUN + i) * gradients.stride;
            widen_row(g + (k + i) * grad_stride + column, row, there);
            std::fill(row + there, row + size, 0.0);  // beyond the end; what lies beyond the block is never written
          }
        }
        for (int64_t b = 0; b < count; ++b) {
          const double* block = gradients.data + b * RUN * gradients.stride;
          double* total = totals.data + b * rows * totals.stride;
          int64_t p = 0;
          for (; p + ROWS / 2 < size; p += ROWS) add_rows<ROWS>(block, p, run, gradients.stride, total, totals.stride);
          if (p + ROWS / 4 < size) {
            add_rows<ROWS / 2>(block, p, run, gradients.stride, total, totals.stride);
          } else if (p < size) {
            add_rows<ROWS / 4>(block, p, run, gradients.stride, total, totals.stride);
          }
        }
      }
      for (int64_t b = 0; b < count; ++b) {
        double* sum = sums + (first + b) * length;
        for (int64_t i = 0; i < size; sum += ++i) add(1.0, totals.data + (b * rows + i) * totals.stride, sum, i + 1);
      }
    }
  });
}

void add_gram_cpu(Tensor sums, const Tensor& g, int64_t size) {
  STD_TORCH_CHECK(g.dim() == 2 && (g.size(1) <= 1 || g.stride(1) == 1), "expected gradients (n, d) with contiguous rows");
  const int64_t n = g.size(0), d = g.size(1);
  STD_TORCH_CHECK(sums.dim() == 2 && sums.scalar_type() == ScalarType::Double && sums.is_contiguous(),
                  "expected contiguous float64 sums (k, t)");
  STD_TORCH_CHECK(size >= 1 && sums.size(0) == (d + size - 1) / size && sums.size(1) == triangle(size), "sums (", sums.size(0), ", ",
                  sums.size(1), ") do not fit blocks of ", size, " in ", d, " columns");
  double* out = static_cast<double*>(sums.data_ptr());
  if (g.scalar_type() == ScalarType::Float) {
    add_gram(out, size, static_cast<const float*>(g.data_ptr()), g.stride(0), n, d);
  } else if (g.scalar_type() == ScalarType::BFloat16) {
    add_gram(out, size, static_cast<const BFloat16*>(g.data_ptr()), g.stride(0), n, d);
  } else {
    STD_TORCH_CHECK(g.scalar_type() == ScalarType::Double, "gradients are float32, bfloat16 or float64");
    add_gram(out, size, static_cast<const double*>(g.data_ptr()), g.stride(0), n, d);
  }
}

Tensor unpack_gram_cpu(const Tensor& sums, int64_t size, double divisor, double damping, const std::optional<Tensor>& keep) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.scalar_type() == ScalarType::Double && sums.is_contiguous(),
                  "expected contiguous float64 sums (k, t)");
  const int64_t blocks = sums.size(0), length = sums.size(1);
  STD_TORCH_CHECK(size >= 1 && length == triangle(size), "sums of ", length, " numbers are no triangle of ", size, " rows");
  STD_TORCH_CHECK(!keep || (keep->dim() == 2 && keep->size(0) == blocks && keep->size(1) == size && keep->is_contiguous() &&
                            keep->scalar_type() == ScalarType::Bool),
                  "expected a contiguous mask of bool for ", blocks, " blocks of ", size, " weights");
  Tensor out = torch::stable::new_empty(sums, {blocks, size, size}, ScalarType::Double);
  const double* in = static_cast<const double*>(sums.data_ptr());
  const bool* mask = keep ? static_cast<const bool*>(keep->data_ptr()) : nullptr;
  double* to = static_cast<double*>(out.data_ptr());
  const double scale = 1 / divisor;
  torch::stable::parallel_for(0, blocks, 1, [=](int64_t begin, int64_t end) {
    std::vector<double> kept(size, 1.0);  // 0 where the mask is false
    for (int64_t b = begin; b < end; ++b) {
      const double* sum = in + b * length;
      double* matrix = to + b * size * size;
      if (mask != nullptr) std::copy(mask + b * size, mask + (b + 1) * size, kept.begin());
      for (int64_t i = 0; i < size; sum += ++i) {
        double* row = matrix + i * size;
        const double factor = scale * kept[i];
        for (int64_t j = 0; j <= i; ++j) row[j] = factor * kept[j] * sum[j];
        row[i] += kept[i] != 0 ? damping : 1.0;
        if (i % ROWS != ROWS - 1 && i != size - 1) continue;
        // What these rows have left of the diagonal is the same above it.
        const int64_t top = i / ROWS * ROWS;
        for (int64_t j = 0; j < i; ++j) {
          for (int64_t r = std::max(top, j + 1); r <= i; ++r) matrix[j * size + r] = matrix[r * size + j];
        }
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) {
  m.impl("add_gram", TORCH_BOX(&add_gram_cpu));
  m.impl("unpack_gram", TORCH_BOX(&unpack_gram_cpu));
}

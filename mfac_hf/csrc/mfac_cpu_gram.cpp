// CPU kernel for sums of outer products in blocks: add_gram (see mfac_hf/ops/blocks.py).
//
// A few gradients at a time are widened to float64, for a few neighbouring blocks. They stay in a core's own cache until all
// tiles on and below the diagonal have taken their products in registers. The half above the diagonal is written at the end.
//
// Results do not depend on the number of threads: a thread has whole blocks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "mfac_cpu_tile.h"

using namespace mfac;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t RUN = 64;       // gradients at a time: a block of 50 columns stays in the first cache meanwhile
constexpr int64_t COLUMNS = 256;  // about how many, over neighbouring blocks: what is read of a gradient at once

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

// One panel of each block: of its `size` columns and rows, `width` columns and `height` rows from number `start` on.
struct Panels {
  double* sums;
  int64_t blocks, height, width, size, start;
};

template <typename G>
void add_gram(const Panels& panels, const G* g, int64_t stride, int64_t n, int64_t d) {
  const auto [sums, blocks, height, width, size, start] = panels;
  const int64_t rows = round_up(height, ROWS), group = std::max<int64_t>(1, COLUMNS / height);
  torch::stable::parallel_for(0, (blocks + group - 1) / group, 1, [=](int64_t begin, int64_t end) {
    Workspace<double> gradients(height, group * RUN), totals(width, group * rows);
    for (int64_t first = begin * group; first < std::min(end * group, blocks); first += group) {
      const int64_t count = std::min(group, blocks - first);
      std::fill(totals.data, totals.data + count * rows * totals.stride, 0.0);
      for (int64_t k = 0; k < n; k += RUN) {
        const int64_t run = std::min(RUN, n - k);
        for (int64_t i = 0; i < run; ++i) {
          for (int64_t b = 0; b < count; ++b) {
            const int64_t column = (first + b) * size + start, there = std::min(height, std::max<int64_t>(d - column, 0));
            double* row = gradients.data + (b * RUN + i) * gradients.stride;
            widen_row(g + (k + i) * stride + column, row, there);
            std::fill(row + there, row + height, 0.0);  // beyond the end; what lies beyond the block is never written
          }
        }
        for (int64_t b = 0; b < count; ++b) {
          const double* block = gradients.data + b * RUN * gradients.stride;
          for (int64_t p = 0; p < height; p += ROWS) {
            double* target = totals.data + (b * rows + p) * totals.stride;
            for (int64_t c = 0; c < std::min(p + ROWS, width); c += Tile<double>::WIDTH) {
              Tile<double> t;
              read(t, target + c, totals.stride);
              add_products<true>(t, block + p, block + c, run, gradients.stride);
              write(t, target + c, totals.stride);
            }
          }
        }
      }
      for (int64_t b = 0; b < count; ++b) {
        double* panel = sums + (first + b) * height * width;
        for (int64_t i = 0; i < height; ++i) {
          const double* total = totals.data + (b * rows + i) * totals.stride;
          for (int64_t j = 0; j < std::min(i + 1, width); ++j) panel[i * width + j] += total[j];
          for (int64_t j = 0; i < width && j < i; ++j) panel[j * width + i] = panel[i * width + j];
        }
      }
    }
  });
}

void add_gram_cpu(Tensor sums, const Tensor& g, int64_t size, int64_t start) {
  STD_TORCH_CHECK(sums.dim() == 3 && sums.scalar_type() == ScalarType::Double && sums.is_contiguous(),
                  "expected contiguous float64 sums (k, b, p)");
  STD_TORCH_CHECK(g.dim() == 2 && (g.size(1) <= 1 || g.stride(1) == 1), "expected gradients (n, d) with contiguous rows");
  const int64_t n = g.size(0), d = g.size(1);
  const Panels panels = {static_cast<double*>(sums.data_ptr()), sums.size(0), sums.size(1), sums.size(2), size, start};
  STD_TORCH_CHECK(size >= 1 && start >= 0 && start + panels.height == size && panels.width <= panels.height &&
                      panels.blocks == (d + size - 1) / size,
                  "sums (", panels.blocks, ", ", panels.height, ", ", panels.width, ") do not fit blocks of ", size, " in ", d,
                  " columns from column ", start, " on");
  if (g.scalar_type() == ScalarType::Float) {
    add_gram(panels, static_cast<const float*>(g.data_ptr()), g.stride(0), n, d);
  } else if (g.scalar_type() == ScalarType::BFloat16) {
    add_gram(panels, static_cast<const BFloat16*>(g.data_ptr()), g.stride(0), n, d);
  } else {
    STD_TORCH_CHECK(g.scalar_type() == ScalarType::Double, "gradients are float32, bfloat16 or float64");
    add_gram(panels, static_cast<const double*>(g.data_ptr()), g.stride(0), n, d);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) { m.impl("add_gram", TORCH_BOX(&add_gram_cpu)); }

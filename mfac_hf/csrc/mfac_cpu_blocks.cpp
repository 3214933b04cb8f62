// CPU kernels for batches of small symmetric positive definite matrices: spd_inverse, spd_solve and the dual form's dual_inverse (see
// mfac_hf/ops/blocks.py).
//
// A = U^T U is computed by panels of ROWS rows. A tile of the current panel takes the products with all earlier panels in
// registers, is then solved with the triangle on the diagonal, and is written once. Further columns can be carried along.
//
// Results do not depend on the number of threads: a thread has whole matrices.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "mfac_cpu_tile.h"

using namespace mfac;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t WIDTH = Tile<double>::WIDTH;
constexpr double NOTHING = std::numeric_limits<double>::quiet_NaN();

// Factors the square in the first half of a tile and takes the same steps in the second half; scale gets the reciprocals of the
// diagonal. Returns the number of the first pivot that is not positive, or 0.
inline int factor_tile(Tile<double>& t, double* scale) {
  static_assert(ROWS == Lanes<double>::COUNT, "the first half of a tile has as many columns as rows");
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const double pivot = t.v[r][0][r];
    if (!(pivot > 0)) return r + 1;
    scale[r] = 1 / std::sqrt(pivot);
    t.v[r][0] *= scale[r];
    t.v[r][1] *= scale[r];
#pragma GCC unroll 8
    for (int q = r + 1; q < ROWS; ++q) {
      const double factor = t.v[r][0][q];
      t.v[q][0] -= factor * t.v[r][0];
      t.v[q][1] -= factor * t.v[r][1];
    }
  }
  return 0;
}

// Subtracts the products of earlier rows from the tile at target and solves it with the triangle.
inline void eliminate(double* target, const double* left, const double* right, int64_t count, const double* triangle,
                      const double* scale, int64_t stride) {
  Tile<double> t;
  read(t, target, stride);
  add_products<false>(t, left, right, count, stride);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    t.v[r][0] *= scale[r];
    t.v[r][1] *= scale[r];
#pragma GCC unroll 8
    for (int q = r + 1; q < ROWS; ++q) {
      t.v[q][0] -= triangle[r * stride + q] * t.v[r][0];
      t.v[q][1] -= triangle[r * stride + q] * t.v[r][1];
    }
  }
  write(t, target, stride);
}

// Writes U over A; scale gets the reciprocals of the diagonal. Calls carry(p) when the rows from p to p + ROWS are done, for what else
// takes the same steps. Returns the number of the first pivot that is not positive, or 0.
template <typename F>
int64_t factor(double* a, double* scale, int64_t rows, int64_t stride, const F& carry) {
  for (int64_t p = 0; p < rows; p += ROWS) {
    double* panel = a + p * stride;
    Tile<double> t;
    read(t, panel + p, stride);
    add_products<false>(t, a + p, a + p, p, stride);
    if (const int bad = factor_tile(t, scale + p)) return p + bad;
    write(t, panel + p, stride);
    for (int64_t c = p + WIDTH; c < rows; c += WIDTH) eliminate(panel + c, a + p, a + c, p, panel + p, scale + p, stride);
    carry(p);
  }
  return 0;
}

// Solves U^T U z = y, and writes z over y.
void substitute(const double* a, const double* scale, double* y, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] *= scale[i];
    add(-y[i], a + i * stride + i + 1, y + i + 1, n - i - 1);
  }
  for (int64_t i = n - 1; i >= 0; --i) y[i] = (y[i] - dot(a + i * stride + i + 1, y + i + 1, n - i - 1)) * scale[i];
}

// Writes the lower tiles of X^T X, with X lower triangular, into out.
void square(const double* x, double* out, int64_t rows, int64_t stride) {
  for (int64_t p = 0; p < rows; p += ROWS) {
    for (int64_t c = 0; c < p + ROWS; c += WIDTH) {
      Tile<double> t = {};
      add_products<true>(t, x + p * stride + p, x + p * stride + c, rows - p, stride);
      write(t, out + p * stride + c, stride);
    }
  }
}

// Copies a matrix of n rows into a workspace, the rest of which becomes that of the identity.
void copy_in(const double* matrix, int64_t n, double* a, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    double* row = a + i * stride;
    if (i < n) std::copy(matrix + i * n, matrix + (i + 1) * n, row);
    std::fill(row + (i < n ? n : 0), row + stride, 0.0);
    if (i >= n) row[i] = 1;
  }
}

void check_matrices(const Tensor& matrices) {
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), "expected square matrices (k, b, b)");
  STD_TORCH_CHECK(matrices.scalar_type() == ScalarType::Double && matrices.is_contiguous(), "expected contiguous float64 matrices");
}

std::tuple<Tensor, Tensor> spd_inverse_cpu(const Tensor& matrices) {
  check_matrices(matrices);
  const int64_t blocks = matrices.size(0), n = matrices.size(1), rows = round_up(n, ROWS);
  Tensor inverse = torch::stable::new_empty(matrices, {blocks, n, n}, ScalarType::Double);
  Tensor info = torch::stable::new_empty(matrices, {blocks}, ScalarType::Int);
  const double* in = static_cast<const double*>(matrices.data_ptr());
  double* out = static_cast<double*>(inverse.data_ptr());
  int32_t* bad = static_cast<int32_t*>(info.data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [=](int64_t begin, int64_t end) {
    Workspace<double> work(n, 2 * rows);
    std::vector<double> scale(rows);
    double *a = work.data, *below = a + rows * work.stride;
    for (int64_t block = begin; block < end; ++block) {
      copy_in(in + block * n * n, n, a, rows, work.stride);
      copy_in(nullptr, 0, below, rows, work.stride);
      double* target = out + block * n * n;
      bad[block] = static_cast<int32_t>(factor(a, scale.data(), rows, work.stride, [&](int64_t p) {
        // The identity becomes U^-T, which is zero right of the diagonal.
        for (int64_t c = 0; c < p + ROWS; c += WIDTH) {
          eliminate(below + p * work.stride + c, a + c * work.stride + p, below + c * work.stride + c, std::max<int64_t>(p - c, 0),
                    a + p * work.stride + p, scale.data() + p, work.stride);
        }
      }));
      if (bad[block] != 0) {
        std::fill(target, target + n * n, NOTHING);
        continue;
      }
      square(below, a, rows, work.stride);
      for (int64_t p = 0; p < n; p += ROWS) {
        const int64_t last = std::min(p + ROWS, n);
        for (int64_t i = p; i < last; ++i) std::copy(a + i * work.stride, a + i * work.stride + i + 1, target + i * n);
        for (int64_t j = 0; j < last; ++j) {
          for (int64_t i = std::max(p, j + 1); i < last; ++i) target[j * n + i] = a[i * work.stride + j];
        }
      }
    }
  });
  return {inverse, info};
}

std::tuple<Tensor, Tensor> spd_solve_cpu(const Tensor& matrices, const Tensor& x) {
  check_matrices(matrices);
  const int64_t blocks = matrices.size(0), n = matrices.size(1), rows = round_up(n, ROWS);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == blocks && x.size(1) == n && x.scalar_type() == ScalarType::Double && x.is_contiguous(),
                  "expected a contiguous float64 vector of ", n, " numbers for each of ", blocks, " matrices");
  Tensor solution = torch::stable::new_empty(matrices, {blocks, n}, ScalarType::Double);
  Tensor info = torch::stable::new_empty(matrices, {blocks}, ScalarType::Int);
  const double *in = static_cast<const double*>(matrices.data_ptr()), *right = static_cast<const double*>(x.data_ptr());
  double* out = static_cast<double*>(solution.data_ptr());
  int32_t* bad = static_cast<int32_t*>(info.data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [=](int64_t begin, int64_t end) {
    Workspace<double> work(n, rows);
    std::vector<double> scale(rows);
    for (int64_t block = begin; block < end; ++block) {
      copy_in(in + block * n * n, n, work.data, rows, work.stride);
      double* y = out + block * n;
      bad[block] = static_cast<int32_t>(factor(work.data, scale.data(), rows, work.stride, [](int64_t) {}));
      if (bad[block] != 0) {
        std::fill(y, y + n, NOTHING);
        continue;
      }
      std::copy(right + block * n, right + (block + 1) * n, y);
      substitute(work.data, scale.data(), y, n, work.stride);
    }
  });
  return {solution, info};
}

// Widens the columns of a block: into rows, one for each gradient, and into turned, one for each column.
template <typename G>
void copy_block(const G* g, int64_t grad_stride, int64_t m, int64_t columns, double* rows, double* turned, int64_t stride) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < columns; ++j) rows[i * stride + j] = turned[j * stride + i] = widen<double>(g[i * grad_stride + j]);
  }
}

// The m x m system of each block, K = shift I + G G^T = U^T U, and what it is for: with W = U^-T G the diagonal 1 - sum of W^2, or
// x - G^T K^-1 G x.
template <typename G>
void dual_inverse(const G* g, int64_t grad_stride, int64_t m, int64_t d, int64_t size, double shift, const double* x, double* out,
                  int32_t* bad) {
  const int64_t blocks = (d + size - 1) / size, rows = round_up(m, ROWS);
  torch::stable::parallel_for(0, blocks, 1, [=](int64_t begin, int64_t end) {
    Workspace<double> work(std::max(rows, size), 2 * rows + size);
    const int64_t stride = work.stride;
    std::vector<double> scale(rows), y(rows);
    double *a = work.data, *w = a + rows * stride, *turned = w + rows * stride;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = block * size, columns = std::min(size, d - column);
      double* target = out + column;
      copy_block(g + column, grad_stride, m, columns, w, turned, stride);
      for (int64_t p = 0; p < rows; p += ROWS) {
        for (int64_t c = p; c < rows; c += WIDTH) {
          Tile<double> t = {};
          add_products<true>(t, turned + p, turned + c, columns, stride);
          write(t, a + p * stride + c, stride);
        }
      }
      for (int64_t i = 0; i < rows; ++i) a[i * stride + i] += i < m ? shift : 1.0;
      bad[block] = static_cast<int32_t>(factor(a, scale.data(), rows, stride, [&](int64_t p) {
        for (int64_t c = 0; x == nullptr && c < columns; c += WIDTH) {
          eliminate(w + p * stride + c, a + p, w + c, p, a + p * stride + p, scale.data() + p, stride);
        }
      }));
      if (bad[block] != 0) {
        std::fill(target, target + columns, NOTHING);
      } else if (x == nullptr) {
        std::fill(target, target + columns, 1.0);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < columns; ++j) target[j] -= w[i * stride + j] * w[i * stride + j];
        }
      } else {
        for (int64_t i = 0; i < m; ++i) y[i] = dot(w + i * stride, x + column, columns);
        substitute(a, scale.data(), y.data(), m, stride);
        std::copy(x + column, x + column + columns, target);
        for (int64_t i = 0; i < m; ++i) add(-y[i], w + i * stride, target, columns);
      }
    }
  });
}

std::tuple<Tensor, Tensor> dual_inverse_cpu(const Tensor& g, int64_t size, double shift, const std::optional<Tensor>& x) {
  STD_TORCH_CHECK(g.dim() == 2 && (g.size(1) <= 1 || g.stride(1) == 1), "expected gradients (m, d) with contiguous rows");
  const int64_t m = g.size(0), d = g.size(1);
  STD_TORCH_CHECK(size >= 1, "expected a block size of at least 1");
  STD_TORCH_CHECK(!x || (x->dim() == 1 && x->size(0) == d && x->scalar_type() == ScalarType::Double && x->is_contiguous()),
                  "expected a contiguous float64 vector of ", d, " numbers");
  Tensor out = torch::stable::new_empty(g, {d}, ScalarType::Double);
  Tensor info = torch::stable::new_empty(g, {(d + size - 1) / size}, ScalarType::Int);
  const double* vector = x ? static_cast<const double*>(x->data_ptr()) : nullptr;
  double* to = static_cast<double*>(out.data_ptr());
  int32_t* bad = static_cast<int32_t*>(info.data_ptr());
  if (g.scalar_type() == ScalarType::Float) {
    dual_inverse(static_cast<const float*>(g.data_ptr()), g.stride(0), m, d, size, shift, vector, to, bad);
  } else {
    STD_TORCH_CHECK(g.scalar_type() == ScalarType::Double, "gradients are float32 or float64");
    dual_inverse(static_cast<const double*>(g.data_ptr()), g.stride(0), m, d, size, shift, vector, to, bad);
  }
  return {out, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) {
  m.impl("dual_inverse", TORCH_BOX(&dual_inverse_cpu));
  m.impl("spd_inverse", TORCH_BOX(&spd_inverse_cpu));
  m.impl("spd_solve", TORCH_BOX(&spd_solve_cpu));
}

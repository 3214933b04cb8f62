// CPU kernel for the greedy trace of single weights: greedy_trace (see mfac_hf/pruning/trace.py, whose method it follows).
//
// A block stays in a core's cache from its first removal to its last. Columns are computed when they are needed. After every
// PANEL removals the removed coordinates are dropped from the matrix, and the rest is brought up to date by tiles in registers.
//
// Results do not depend on the number of threads: a thread has whole blocks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>

#include "mfac_cpu_tile.h"

using namespace mfac;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t PANEL = 16;
constexpr float ENDLESS = std::numeric_limits<float>::infinity();

// What is left of a block: n_ coordinates, whose places in the block are in ids_. gone_ marks those removed since the last panel.
template <typename A>
class Block {
 public:
  explicit Block(int64_t size)
      : matrix_(size, round_up(size, ROWS)),
        columns_(size, PANEL),
        diagonal_(size),
        weights_(size),
        costs_(size),
        ids_(size),
        gone_(size) {}

  void trace(const A* inverse, const A* weights, const bool* keep, int64_t size, float* costs) {
    std::fill(costs, costs + size, ENDLESS);
    n_ = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (keep[i]) ids_[n_++] = i;
    }
    const int64_t stride = matrix_.stride;
    for (int64_t i = 0; i < n_; ++i) {
      A* row = matrix_.data + i * stride;
      for (int64_t j = 0; j < n_; ++j) row[j] = inverse[ids_[i] * size + ids_[j]];
      std::fill(row + n_, row + stride, A(0));
      diagonal_[i] = row[i];
      weights_[i] = weights[ids_[i]];
      gone_[i] = false;
    }
    std::fill(matrix_.data + n_ * stride, matrix_.data + round_up(n_, ROWS) * stride, A(0));
    float running = -1;
    while (n_ > 0) {
      const int64_t most = std::min(PANEL, n_);
      for (int64_t removed = 0; removed < most; ++removed) {
        for (int64_t i = 0; i < n_; ++i) costs_[i] = weights_[i] * weights_[i] / (2 * diagonal_[i]);
        int64_t p = -1;
        for (int64_t i = 0; i < n_; ++i) {
          if (!gone_[i] && costs_[i] < (p < 0 ? std::numeric_limits<A>::infinity() : costs_[p])) p = i;
        }
        if (p < 0) return;
        running = std::max(static_cast<float>(costs_[p]), std::nextafter(running, ENDLESS));
        costs[ids_[p]] = running;
        remove(p, removed);
      }
      drop(most);
    }
  }

 private:
  void remove(int64_t p, int64_t removed) {
    A *columns = columns_.data, *column = columns + removed * columns_.stride;
    std::copy(matrix_.data + p * matrix_.stride, matrix_.data + p * matrix_.stride + n_, column);
    for (int64_t r = 0; r < removed; ++r) add(-columns[r * columns_.stride + p], columns + r * columns_.stride, column, n_);
    const A scale = 1 / std::sqrt(column[p]), weight = weights_[p] * scale;
    for (int64_t i = 0; i < n_; ++i) {
      column[i] *= scale;
      weights_[i] -= weight * column[i];
      diagonal_[i] -= column[i] * column[i];
    }
    // Nothing is left of either: their cost would be 0 / 0.
    weights_[p] = 0;
    diagonal_[p] = 1;
    gone_[p] = true;
  }

  void drop(int64_t removed) {
    int64_t left = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (!gone_[i]) places_[left++] = i;
    }
    const int64_t stride = matrix_.stride;
    const auto gather = [&](const A* from, A* to) {
      for (int64_t j = 0; j < left; ++j) to[j] = from[places_[j]];
      std::fill(to + left, to + n_, A(0));
    };
    for (int64_t i = 0; i < left; ++i) gather(matrix_.data + places_[i] * stride, matrix_.data + i * stride);
    for (int64_t r = 0; r < removed; ++r) gather(columns_.data + r * stride, columns_.data + r * stride);
    for (int64_t i = 0; i < left; ++i) {
      diagonal_[i] = diagonal_[places_[i]];
      weights_[i] = weights_[places_[i]];
      ids_[i] = ids_[places_[i]];
    }
    std::fill(gone_.begin(), gone_.begin() + left, 0);
    n_ = left;
    for (int64_t i = 0; i < n_; i += ROWS) {
      for (int64_t j = 0; j < n_; j += Tile<A>::WIDTH) {
        Tile<A> t;
        read(t, matrix_.data + i * stride + j, stride);
        add_products<false>(t, columns_.data + i, columns_.data + j, removed, stride);
        write(t, matrix_.data + i * stride + j, stride);
      }
    }
  }

  Workspace<A> matrix_, columns_;  // both with the same stride
  std::vector<A> diagonal_, weights_, costs_;
  std::vector<int64_t> ids_;
  std::vector<uint8_t> gone_;
  std::vector<int64_t> places_ = std::vector<int64_t>(ids_.size());
  int64_t n_ = 0;
};

Tensor greedy_trace_cpu(const Tensor& inverse, const Tensor& weights, const Tensor& keep) {
  STD_TORCH_CHECK(weights.dim() == 2 && inverse.dim() == 3 && keep.dim() == 2,
                  "expected matrices (k, b, b), weights and mask (k, b)");
  const int64_t blocks = weights.size(0), size = weights.size(1);
  STD_TORCH_CHECK(inverse.size(0) == blocks && inverse.size(1) == size && inverse.size(2) == size && keep.size(0) == blocks &&
                      keep.size(1) == size,
                  "expected matrices and a mask for ", blocks, " blocks of ", size, " weights");
  STD_TORCH_CHECK(inverse.scalar_type() == weights.scalar_type() && keep.scalar_type() == ScalarType::Bool,
                  "expected matrices and weights of one dtype, and a mask of bool");
  STD_TORCH_CHECK(inverse.is_contiguous() && weights.is_contiguous() && keep.is_contiguous(), "expected contiguous tensors");
  Tensor out = torch::stable::new_empty(weights, {blocks, size}, ScalarType::Float);
  float* costs = static_cast<float*>(out.data_ptr());
  const bool* mask = static_cast<const bool*>(keep.data_ptr());
  const auto run = [&](auto working) {
    using A = decltype(working);
    const A *h = static_cast<const A*>(inverse.data_ptr()), *w = static_cast<const A*>(weights.data_ptr());
    torch::stable::parallel_for(0, blocks, 1, [=](int64_t begin, int64_t end) {
      Block<A> block(size);
      for (int64_t k = begin; k < end; ++k) {
        block.trace(h + k * size * size, w + k * size, mask + k * size, size, costs + k * size);
      }
    });
  };
  if (weights.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float, "weights are float32 or float64");
    run(float{});
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) { m.impl("greedy_trace", TORCH_BOX(&greedy_trace_cpu)); }

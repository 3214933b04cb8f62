// Registers the CUDA kernels as torch operators through torch's stable ABI (schemas: mfac_hf/ops/window.py,
// metric.py and coefficients.py). Each function checks what an address is computed from, allocates, and queues its kernels on
// torch's current stream of the tensors' device.
//
// With MFAC_EMULATED the kernels run on the processor, for the tests: they are registered for CPU and need no device and stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "mfac_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Makes the tensors' device current while it lives, and has torch's current stream there.
class Queue {
 public:
#ifdef MFAC_EMULATED
  explicit Queue(const Tensor&) {}
#else
  explicit Queue(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#ifndef MFAC_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

void check(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, "the CUDA kernel of mfac::", name, " could not be queued: ", mfac_error_text(error));
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

int type_of(const Tensor& g) {
  if (g.scalar_type() == ScalarType::Float) return MFAC_FLOAT32;
  if (g.scalar_type() == ScalarType::BFloat16) return MFAC_BFLOAT16;
  STD_TORCH_CHECK(is_double(g), "the window is float32, bfloat16 or float64");
  return MFAC_FLOAT64;
}

void check_window(const Tensor& g) {
  STD_TORCH_CHECK(g.dim() == 2, "the window has ", g.dim(), " dimensions; expected a matrix (m, d)");
  STD_TORCH_CHECK(g.size(1) <= 1 || g.stride(1) == 1, "the columns of the window are ", g.stride(1),
                  " numbers apart; expected contiguous rows");
}

// The vector in the working precision, contiguous.
Tensor vector_of(const Tensor& t, const Tensor& g, int64_t expected, bool wide, const char* name, const char* of_window) {
  STD_TORCH_CHECK(t.dim() == 1, name, " has ", t.dim(), " dimensions; expected a vector");
  STD_TORCH_CHECK(t.size(0) == expected, name, " has ", t.size(0), " numbers; the window has ", expected, of_window);
  STD_TORCH_CHECK(is_double(t) || t.scalar_type() == ScalarType::Float, "a vector is float32 or float64");
  STD_TORCH_CHECK(t.is_cpu() == g.is_cpu() && (t.is_cpu() || t.get_device_index() == g.get_device_index()), name,
                  " is on another device than the window");
  return torch::stable::contiguous(torch::stable::to(t, wide ? ScalarType::Double : ScalarType::Float));
}

Tensor row_dots(const Tensor& g, const Tensor& x) {
  check_window(g);
  const int64_t m = g.size(0), d = g.size(1);
  const int type = type_of(g);
  const bool wide = is_double(g) || is_double(x);
  const Queue queue(g);
  const Tensor vector = vector_of(x, g, d, wide, "x", " columns");
  Tensor out = torch::stable::new_empty(g, {m}, ScalarType::Double);
  Tensor scratch = torch::stable::new_empty(g, {mfac_row_dots_scratch(m, d)}, ScalarType::Double);
  check(mfac_row_dots(g.data_ptr(), type, g.stride(0), m, d, vector.data_ptr(), wide, static_cast<double*>(scratch.data_ptr()),
                      static_cast<double*>(out.data_ptr()), queue.stream()),
        "row_dots");
  return out;
}

Tensor combine(const Tensor& g, const Tensor& w, const std::optional<Tensor>& x, double alpha, double beta) {
  check_window(g);
  const int64_t m = g.size(0), d = g.size(1);
  const int type = type_of(g);
  const bool wide = is_double(g) || (x && is_double(*x));
  const Queue queue(g);
  // Scaled in float64 before they are rounded, as the other implementations do.
  const Tensor unscaled = vector_of(w, g, m, true, "weights", " rows");
  Tensor scaled = torch::stable::new_empty(unscaled, {m});
  check(mfac_combine(unscaled.data_ptr(), MFAC_FLOAT64, m, 0, m, nullptr, unscaled.data_ptr(), beta, scaled.data_ptr(), true,
                     queue.stream()),
        "combine");
  const Tensor weights = torch::stable::to(scaled, wide ? ScalarType::Double : ScalarType::Float);
  const std::optional<Tensor> vector = x ? std::optional(vector_of(*x, g, d, wide, "x", " columns")) : std::nullopt;
  Tensor out = torch::stable::new_empty(g, {d}, wide ? ScalarType::Double : ScalarType::Float);
  check(mfac_combine(g.data_ptr(), type, g.stride(0), m, d, weights.data_ptr(), vector ? vector->data_ptr() : nullptr, alpha,
                     out.data_ptr(), wide, queue.stream()),
        "combine");
  return out;
}

void check_moment(const Tensor& g, const Tensor& moment, double eps) {
  STD_TORCH_CHECK(is_double(moment) || moment.scalar_type() == ScalarType::Float, "the second moment's type is not float32 or float64");
  STD_TORCH_CHECK(moment.dim() == 1 && moment.size(0) == g.size(1) && moment.is_contiguous(), "the second moment has ",
                  moment.numel(), " numbers; the window has ", g.size(1), " columns");
  STD_TORCH_CHECK(moment.is_cpu() == g.is_cpu() && (g.is_cpu() || moment.get_device_index() == g.get_device_index()),
                  "the second moment is on another device than the window");
  STD_TORCH_CHECK(eps > 0, "eps is ", eps, "; expected a number above 0");
}

Tensor metric_push(const Tensor& g, const std::vector<Tensor>& grads, const Tensor& moment, int64_t row, int64_t count, double rate,
                   double eps) {
  check_window(g);
  check_moment(g, moment, eps);
  STD_TORCH_CHECK(grads.size() == 1, "the gradient is in ", grads.size(), " pieces; expected one");
  const Tensor& grad = grads[0];
  STD_TORCH_CHECK(grad.scalar_type() == moment.scalar_type(), "the gradient's type is not that of the second moment");
  STD_TORCH_CHECK(0 <= row && row < count && count <= g.size(0), "row ", row, " of ", count, "; expected 0 <= row < count <= ",
                  g.size(0));
  const int64_t d = g.size(1);
  const int type = type_of(g);
  const bool wide_moment = is_double(moment), wide = wide_moment || is_double(g);
  const Queue queue(g);
  const Tensor vector = vector_of(grad, g, d, wide_moment, "the gradient", " columns");
  Tensor stored = torch::stable::new_empty(g, {d}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor out = torch::stable::new_empty(g, {count}, ScalarType::Double);
  Tensor scratch = torch::stable::new_empty(g, {mfac_row_dots_scratch(count, d)}, ScalarType::Double);
  check(mfac_metric_push(g.data_ptr(), type, g.stride(0), d, vector.data_ptr(), moment.data_ptr(), wide_moment, row, count, rate, eps,
                         stored.data_ptr(), static_cast<double*>(scratch.data_ptr()), static_cast<double*>(out.data_ptr()),
                         queue.stream()),
        "metric_push");
  return out;
}

Tensor metric_combine(const Tensor& g, const Tensor& w, const Tensor& moment, double eps, bool wide) {
  check_window(g);
  check_moment(g, moment, eps);
  const int64_t m = g.size(0), d = g.size(1);
  const bool wide_moment = is_double(moment), wide_sums = wide || wide_moment || is_double(g);
  const int type = type_of(g);
  const Queue queue(g);
  const Tensor weights = vector_of(w, g, m, wide_sums, "weights", " rows");
  Tensor out = torch::stable::new_empty(moment, {d});
  check(mfac_metric_combine(g.data_ptr(), type, g.stride(0), m, d, weights.data_ptr(), wide_sums, moment.data_ptr(), wide_moment, eps,
                            out.data_ptr(), queue.stream()),
        "metric_combine");
  return out;
}

void check_lower(const Tensor& lower) {
  STD_TORCH_CHECK(lower.dim() == 2 && lower.size(0) == lower.size(1) && lower.is_contiguous(),
                  "expected a contiguous square matrix");
  STD_TORCH_CHECK(is_double(lower) || lower.scalar_type() == ScalarType::Float, "the matrix is float32 or float64");
}

Tensor unit_lower_inverse(const Tensor& lower) {
  check_lower(lower);
  const Queue queue(lower);
  Tensor out = torch::stable::new_empty(lower, {lower.size(0), lower.size(0)});
  check(mfac_unit_lower_inverse(lower.data_ptr(), is_double(lower), lower.size(0), out.data_ptr(), queue.stream()),
        "unit_lower_inverse");
  return out;
}

Tensor lower_product(const Tensor& lower, const Tensor& x, bool transposed) {
  check_lower(lower);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == lower.size(0) && x.scalar_type() == lower.scalar_type(),
                  "expected a vector of ", lower.size(0), " numbers in the type of the matrix");
  STD_TORCH_CHECK(x.is_cpu() == lower.is_cpu() && (x.is_cpu() || x.get_device_index() == lower.get_device_index()),
                  "x is on another device than the matrix");
  const Queue queue(lower);
  const Tensor vector = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(lower, {lower.size(0)});
  check(mfac_lower_product(lower.data_ptr(), is_double(lower), transposed, lower.size(0), vector.data_ptr(), out.data_ptr(),
                           queue.stream()),
        "lower_product");
  return out;
}

}  // namespace

#ifdef MFAC_EMULATED
STABLE_TORCH_LIBRARY_IMPL(mfac, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(mfac, CUDA, m) {
#endif
  m.impl("row_dots", TORCH_BOX(&row_dots));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("metric_push", TORCH_BOX(&metric_push));
  m.impl("metric_combine", TORCH_BOX(&metric_combine));
  m.impl("unit_lower_inverse", TORCH_BOX(&unit_lower_inverse));
  m.impl("lower_product", TORCH_BOX(&lower_product));
}

// The CUDA kernels of mfac_hf behind plain C functions: raw device pointers, a stream (cudaStream_t as void*), an error code.
//
// Each function queues its kernels on the stream and returns 0, or the CUDA error of a launch (mfac_error_text explains it).
// `stride` is the distance of rows in numbers. Results are the same bits at each call: no atomics, sums in a fixed order.

#pragma once

#include <cstdint>

#define MFAC_API extern "C" __attribute__((visibility("default")))

enum MfacType { MFAC_FLOAT32 = 0, MFAC_BFLOAT16 = 1, MFAC_FLOAT64 = 2 };

MFAC_API const char* mfac_error_text(int error);

// float64 numbers of scratch memory that mfac_row_dots needs for a window of m x d.
MFAC_API int64_t mfac_row_dots_scratch(int64_t m, int64_t d);

// out[i] = sum over j of grads[i, j] * x[j], for i < m. x is float64 where `wide` (always for a float64 window), else float32.
MFAC_API int mfac_row_dots(const void* grads, int type, int64_t stride, int64_t m, int64_t d, const void* x, bool wide,
                           double* scratch, double* out, void* stream);

// out[j] = alpha * x[j] + sum over i of weights[i] * grads[i, j], for j < d; x may be null. x, weights and out are float64 where
// `wide` (always for a float64 window), else float32.
MFAC_API int mfac_combine(const void* grads, int type, int64_t stride, int64_t m, int64_t d, const void* weights, const void* x,
                          double alpha, void* out, bool wide, void* stream);

// In Adam's metric: moment += rate * (grad^2 - moment), row `row` = grad / sqrt(sqrt(moment) + eps), rounded to the window's type,
// and out[i] = dot product of that row with row i, for i < count. grad and moment are float64 where `wide_moment`, else float32;
// `stored` is room for d numbers, float64 where the moment or the window is, else float32; scratch as for mfac_row_dots with m = count.
MFAC_API int mfac_metric_push(void* grads, int type, int64_t stride, int64_t d, const void* grad, void* moment, bool wide_moment,
                              int64_t row, int64_t count, double rate, double eps, void* stored, double* scratch, double* out,
                              void* stream);

// out[j] = sum over i of weights[i] * grads[i, j], divided by sqrt(sqrt(moment[j]) + eps). weights are float64 where `wide` (always
// for a float64 window or moment), else float32; moment and out are float64 where `wide_moment`, else float32.
MFAC_API int mfac_metric_combine(const void* grads, int type, int64_t stride, int64_t m, int64_t d, const void* weights, bool wide,
                                 const void* moment, bool wide_moment, double eps, void* out, void* stream);

// The paper's coefficients: the inverse of a unit lower triangular matrix (m x m, contiguous; float64 where `wide`, else float32).
MFAC_API int mfac_unit_lower_inverse(const void* lower, bool wide, int64_t m, void* out, void* stream);

// The product of a lower triangular matrix, or of its transpose, with a vector of the same type.
MFAC_API int mfac_lower_product(const void* lower, bool wide, bool transposed, int64_t m, const void* x, void* out, void* stream);

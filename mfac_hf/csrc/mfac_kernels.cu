// CUDA kernels for the two passes over the gradient window, also in Adam's metric, and for the paper's coefficients (see
// mfac_kernels.h).
//
// The passes are bound by memory bandwidth: threads read 16 bytes at a time (fewer only where rows are not aligned to that),
// several rows in flight. The source has neither warp intrinsics nor dynamic shared memory, so that it also compiles as C++ for
// the tests, with a header that stands in for cuda_runtime.h.

#include "mfac_kernels.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <type_traits>

// Queues a kernel; where the launch fails, the calling function returns the error. A kernel's name that has a comma goes into
// parentheses.
#ifdef __CUDACC__
#define MFAC_LAUNCH(kernel, grid, threads, stream, ...)                                        \
  do {                                                                                         \
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);              \
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return static_cast<int>(error); \
  } while (false)
#endif  // else by the header that stands in for cuda_runtime.h

namespace {

#ifndef MFAC_THREADS
#define MFAC_THREADS 256
#endif

constexpr int THREADS = MFAC_THREADS;  // of a block
constexpr int ROWS = 8;                // of the window that a block of row_dots reads side by side
constexpr int LANES = THREADS / ROWS;  // threads that add up a row in the end
constexpr int64_t CHUNK = 8192;        // columns of a block of row_dots: a thread sums 32 of them before float64
constexpr int WEIGHTS = 1024;          // coefficients of combine in shared memory at a time
constexpr int64_t MOST_BLOCKS = 65535; // in the second dimension of a grid
static_assert(LANES * ROWS == THREADS && (THREADS & (THREADS - 1)) == 0, "threads are dealt out to rows, and halved");

struct BFloat16 {
  uint16_t bits;
};

template <typename A, typename G>
__device__ inline A widen(G value) {
  return static_cast<A>(value);
}
template <>
__device__ inline float widen<float, BFloat16>(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
template <>
__device__ inline double widen<double, BFloat16>(BFloat16 value) {
  return widen<float>(value);
}

// COUNT numbers that are read at once.
template <typename G, int COUNT>
struct alignas(sizeof(G) * COUNT) Pack {
  G values[COUNT];
};

template <int COUNT, typename G>
__device__ inline Pack<G, COUNT> load(const G* p) {
  return *reinterpret_cast<const Pack<G, COUNT>*>(p);
}

// partial[chunk, row] = the part of a row's dot product that the columns of one chunk give. Grid: chunks x groups of ROWS rows.
template <typename G, typename A, int COUNT>
__global__ void dot_chunks(const G* grads, int64_t stride, int64_t m, int64_t d, const A* x, double* partial) {
  __shared__ double sums[ROWS][THREADS];
  const int64_t first = blockIdx.x * CHUNK, end = first + CHUNK < d ? first + CHUNK : d;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * ROWS;
  A totals[ROWS] = {};
  int64_t column = first + threadIdx.x * COUNT;
  if (row + ROWS <= m) {
    const G* g = grads + row * stride;
    for (; column + COUNT <= end; column += THREADS * COUNT) {
      Pack<G, COUNT> packs[ROWS];
#pragma unroll
      for (int k = 0; k < ROWS; ++k) packs[k] = load<COUNT>(g + k * stride + column);
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        const A value = x[column + j];
#pragma unroll
        for (int k = 0; k < ROWS; ++k) totals[k] += widen<A>(packs[k].values[j]) * value;
      }
    }
  } else {
    for (; column + COUNT <= end; column += THREADS * COUNT) {
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        if (row + k >= m) continue;
        const Pack<G, COUNT> pack = load<COUNT>(grads + (row + k) * stride + column);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) totals[k] += widen<A>(pack.values[j]) * x[column + j];
      }
    }
  }
  for (; column < end; ++column) {  // less than a pack, at the end of the window: one thread comes here
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      if (row + k < m) totals[k] += widen<A>(grads[(row + k) * stride + column]) * x[column];
    }
  }
#pragma unroll
  for (int k = 0; k < ROWS; ++k) sums[k][threadIdx.x] = totals[k];
  __syncthreads();
  const int k = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  double total = 0;
  for (int i = lane; i < THREADS; i += LANES) total += sums[k][i];
  sums[k][lane] = total;  // which no other thread has read
  __syncthreads();
  if (threadIdx.x < ROWS && row + threadIdx.x < m) {
    total = 0;
    for (int i = 0; i < LANES; ++i) total += sums[threadIdx.x][i];
    partial[blockIdx.x * m + row + threadIdx.x] = total;
  }
}

__global__ void add_chunks(const double* partial, int64_t m, int64_t chunks, double* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= m) return;
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * m + row];
  out[row] = total;
}

// What becomes of a column's sum: alpha * x is added, ...
template <typename A>
struct AddVector {
  const A* x;
  A alpha;
  A* out;
  __device__ void operator()(int64_t column, A total) const { out[column] = total + (x == nullptr ? A(0) : alpha * x[column]); }
};

// ... or it is divided by the root of D = sqrt(moment) + eps.
template <typename A, typename V>
struct Rescale {
  const V* moment;
  V eps;
  V* out;
  __device__ void operator()(int64_t column, A total) const {
    out[column] = static_cast<V>(total) / sqrt(sqrt(moment[column]) + eps);
  }
};

// Each thread has COUNT columns of the result.
template <typename G, typename A, int COUNT, typename F>
__global__ void combine_columns(const G* grads, int64_t stride, int64_t m, int64_t d, const A* weights, F finish) {
  __shared__ A shared[WEIGHTS];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * COUNT;
  const bool whole = column + COUNT <= d;
  A totals[COUNT] = {};
  for (int64_t first = 0; first < m; first += WEIGHTS) {
    const int count = m - first < WEIGHTS ? static_cast<int>(m - first) : WEIGHTS;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) shared[i] = weights[first + i];
    __syncthreads();
    const G* g = grads + first * stride + column;
    if (whole) {
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const Pack<G, COUNT> pack = load<COUNT>(g + i * stride);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) totals[j] += shared[i] * widen<A>(pack.values[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        for (int i = 0; i < count && column + j < d; ++i) totals[j] += shared[i] * widen<A>(g[i * stride + j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if (column + j < d) finish(column + j, totals[j]);
  }
}

// Rounds a number to the type of the window.
template <typename G, typename V>
__device__ inline G narrow(V value) {
  return static_cast<G>(value);
}
template <>
__device__ inline BFloat16 narrow<BFloat16, float>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to the nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16)};
}
template <>
__device__ inline BFloat16 narrow<BFloat16, double>(double value) {
  return narrow<BFloat16>(static_cast<float>(value));
}

// Takes a gradient into the moment and, scaled, into its row; `stored` gets the row as it was rounded. A thread has a column.
template <typename G, typename A, typename V>
__global__ void take_gradient(const V* grad, int64_t d, V rate, V eps, V* moment, G* row, A* stored) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (column >= d) return;
  const V value = grad[column], before = moment[column];
  const V now = before + rate * (value * value - before);
  moment[column] = now;
  const G rounded = narrow<G>(value / sqrt(sqrt(now) + eps));
  row[column] = rounded;
  stored[column] = widen<A>(rounded);
}

// Block c computes column c of the inverse by forward substitution: one number after the other, each from a sum that the block's
// threads share.
template <typename A>
__global__ void invert_columns(const A* lower, int64_t m, A* out) {
  __shared__ A sums[THREADS];
  const int64_t c = blockIdx.x;
  for (int64_t i = threadIdx.x; i <= c; i += THREADS) out[i * m + c] = i == c ? A(1) : A(0);
  __syncthreads();
  for (int64_t i = c + 1; i < m; ++i) {
    A total = 0;
    for (int64_t j = c + threadIdx.x; j < i; j += THREADS) total += lower[i * m + j] * out[j * m + c];
    sums[threadIdx.x] = total;
    __syncthreads();
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) out[i * m + c] = -sums[0];
    __syncthreads();
  }
}

// Each thread has one number of the product: it reads a row of the matrix, or a column where `transposed`.
template <typename A>
__global__ void multiply_lower(const A* lower, bool transposed, int64_t m, const A* x, A* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= m) return;
  A total = 0;
  if (transposed) {
    for (int64_t j = i; j < m; ++j) total += lower[j * m + i] * x[j];
  } else {
    for (int64_t j = 0; j <= i; ++j) total += lower[i * m + j] * x[j];
  }
  out[i] = total;
}

int64_t blocks(int64_t total, int64_t each) { return (total + each - 1) / each; }

// Whether all rows begin where packs may. The stride decides for a single row, too: the first row of a window, alone in it, has
// to be added up in the order that it will have beside others, or equal rows get unequal products.
template <int COUNT, typename G>
bool aligned(const G* grads, int64_t stride) {
  constexpr uintptr_t BYTES = sizeof(G) * COUNT;
  return reinterpret_cast<uintptr_t>(grads) % BYTES == 0 && static_cast<uint64_t>(stride) * sizeof(G) % BYTES == 0;
}

template <int COUNT, typename G, typename A>
int launch_row_dots(const G* grads, int64_t stride, int64_t m, int64_t d, const A* x, double* partial, double* out,
                    void* stream) {
  const int64_t chunks = blocks(d, CHUNK), groups = blocks(m, ROWS);
  for (int64_t group = 0; group < groups; group += MOST_BLOCKS) {
    const int64_t row = group * ROWS, now = groups - group < MOST_BLOCKS ? groups - group : MOST_BLOCKS;
    const int64_t rows = now * ROWS < m - row ? now * ROWS : m - row;
    double* here = partial + chunks * row;
    MFAC_LAUNCH((dot_chunks<G, A, COUNT>), dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(now)), THREADS, stream,
                grads + row * stride, stride, rows, d, x, here);
    MFAC_LAUNCH(add_chunks, dim3(static_cast<unsigned>(blocks(rows, THREADS))), THREADS, stream, here, rows, chunks, out + row);
  }
  return 0;
}

template <int COUNT, typename G, typename A, typename F>
int launch_combine(const G* grads, int64_t stride, int64_t m, int64_t d, const A* weights, F finish, void* stream) {
  MFAC_LAUNCH((combine_columns<G, A, COUNT, F>), dim3(static_cast<unsigned>(blocks(d, THREADS * COUNT))), THREADS, stream, grads,
              stride, m, d, weights, finish);
  return 0;
}

// Calls f with the type of the window, and with how many of its numbers can be read at once: 16 bytes, or what alignment allows.
template <int COUNT>
struct Width {
  static constexpr int value = COUNT;
};
template <typename A, typename F>
int with_window(const void* grads, int type, int64_t stride, F f) {
  if (type == MFAC_FLOAT64) {
    if constexpr (sizeof(A) == sizeof(double)) return f(static_cast<const double*>(grads), Width<1>{});
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (type == MFAC_FLOAT32) {
    const float* g = static_cast<const float*>(grads);
    if constexpr (sizeof(A) == sizeof(float)) {  // float64 arithmetic is rare: one number at a time will do
      if (aligned<4>(g, stride)) return f(g, Width<4>{});
      if (aligned<2>(g, stride)) return f(g, Width<2>{});
    }
    return f(g, Width<1>{});
  }
  if (type != MFAC_BFLOAT16) return static_cast<int>(cudaErrorInvalidValue);
  const BFloat16* g = static_cast<const BFloat16*>(grads);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (aligned<8>(g, stride)) return f(g, Width<8>{});
    if (aligned<4>(g, stride)) return f(g, Width<4>{});
    if (aligned<2>(g, stride)) return f(g, Width<2>{});
  }
  return f(g, Width<1>{});
}

}  // namespace

const char* mfac_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int64_t mfac_row_dots_scratch(int64_t m, int64_t d) { return m * blocks(d, CHUNK); }

int mfac_row_dots(const void* grads, int type, int64_t stride, int64_t m, int64_t d, const void* x, bool wide, double* scratch,
                  double* out, void* stream) {
  if (m == 0) return 0;
  if (d == 0) {
    MFAC_LAUNCH(add_chunks, dim3(static_cast<unsigned>(blocks(m, THREADS))), THREADS, stream, scratch, m, 0, out);
    return 0;
  }
  const auto run = [&](auto working) {
    using A = decltype(working);
    return with_window<A>(grads, type, stride, [&](auto* g, auto width) {
      return launch_row_dots<decltype(width)::value>(g, stride, m, d, static_cast<const A*>(x), scratch, out, stream);
    });
  };
  return wide ? run(double{}) : run(float{});
}

int mfac_combine(const void* grads, int type, int64_t stride, int64_t m, int64_t d, const void* weights, const void* x,
                 double alpha, void* out, bool wide, void* stream) {
  if (d == 0) return 0;
  const auto run = [&](auto working) {
    using A = decltype(working);
    return with_window<A>(grads, type, stride, [&](auto* g, auto width) {
      const AddVector<A> finish{static_cast<const A*>(x), static_cast<A>(alpha), static_cast<A*>(out)};
      return launch_combine<decltype(width)::value>(g, stride, m, d, static_cast<const A*>(weights), finish, stream);
    });
  };
  return wide ? run(double{}) : run(float{});
}

int mfac_metric_push(void* grads, int type, int64_t stride, int64_t d, const void* grad, void* moment, bool wide_moment, int64_t row,
                     int64_t count, double rate, double eps, void* stored, double* scratch, double* out, void* stream) {
  const bool wide = wide_moment || type == MFAC_FLOAT64;
  const auto take = [&](auto working, auto second) {
    using A = decltype(working);
    using V = decltype(second);
    return with_window<A>(grads, type, stride, [&](auto* g, auto) -> int {
      using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
      MFAC_LAUNCH((take_gradient<G, A, V>), dim3(static_cast<unsigned>(blocks(d, THREADS))), THREADS, stream,
                  static_cast<const V*>(grad), d, static_cast<V>(rate), static_cast<V>(eps), static_cast<V*>(moment),
                  static_cast<G*>(grads) + row * stride, static_cast<A*>(stored));
      return 0;
    });
  };
  int error = 0;
  if (d > 0) error = wide_moment ? take(double{}, double{}) : wide ? take(double{}, float{}) : take(float{}, float{});
  return error != 0 ? error : mfac_row_dots(grads, type, stride, count, d, stored, wide, scratch, out, stream);
}

int mfac_metric_combine(const void* grads, int type, int64_t stride, int64_t m, int64_t d, const void* weights, bool wide,
                        const void* moment, bool wide_moment, double eps, void* out, void* stream) {
  if (d == 0) return 0;
  const auto run = [&](auto working, auto second) {
    using A = decltype(working);
    using V = decltype(second);
    return with_window<A>(grads, type, stride, [&](auto* g, auto width) {
      const Rescale<A, V> finish{static_cast<const V*>(moment), static_cast<V>(eps), static_cast<V*>(out)};
      return launch_combine<decltype(width)::value>(g, stride, m, d, static_cast<const A*>(weights), finish, stream);
    });
  };
  return wide_moment ? run(double{}, double{}) : wide ? run(double{}, float{}) : run(float{}, float{});
}

int mfac_unit_lower_inverse(const void* lower, bool wide, int64_t m, void* out, void* stream) {
  if (m == 0) return 0;
  const dim3 grid(static_cast<unsigned>(m));
  if (wide) {
    MFAC_LAUNCH(invert_columns<double>, grid, THREADS, stream, static_cast<const double*>(lower), m, static_cast<double*>(out));
  } else {
    MFAC_LAUNCH(invert_columns<float>, grid, THREADS, stream, static_cast<const float*>(lower), m, static_cast<float*>(out));
  }
  return 0;
}

int mfac_lower_product(const void* lower, bool wide, bool transposed, int64_t m, const void* x, void* out, void* stream) {
  if (m == 0) return 0;
  const dim3 grid(static_cast<unsigned>(blocks(m, THREADS)));
  if (wide) {
    MFAC_LAUNCH(multiply_lower<double>, grid, THREADS, stream, static_cast<const double*>(lower), transposed, m,
                static_cast<const double*>(x), static_cast<double*>(out));
  } else {
    MFAC_LAUNCH(multiply_lower<float>, grid, THREADS, stream, static_cast<const float*>(lower), transposed, m,
                static_cast<const float*>(x), static_cast<float*>(out));
  }
  return 0;
}

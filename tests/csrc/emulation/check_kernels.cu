// Checks the kernels of mfac_kernels.cu against float64, without torch: on a GPU (nvcc; also under compute-sanitizer), or on the
// processor through the header beside this file (c++; also under ThreadSanitizer and AddressSanitizer). Buffers are exactly as
// long as they must be, results and scratch memory start as NaN. Prints a line for each case; the exit code is the failures.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "mfac_kernels.h"

namespace {

template <typename T>
struct Buffer {  // memory that both sides see
  T* data = nullptr;
  int64_t size;
  explicit Buffer(int64_t n, double value = std::numeric_limits<double>::quiet_NaN()) : size(n) {
    if (cudaMallocManaged(&data, (n > 0 ? n : 1) * sizeof(T)) != cudaSuccess) {
      std::printf("no memory on a device: is there a GPU with a driver?\n");
      std::exit(100);
    }
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(value);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

double draw() {  // in [-1, 1), the same numbers in every run
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 33) / (1u << 30) - 1;
}

double rounded(double value, int type) {
  if (type == MFAC_FLOAT64) return value;
  float f = static_cast<float>(value);
  if (type == MFAC_BFLOAT16) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    bits &= 0xffff0000u;
    std::memcpy(&f, &bits, 4);
  }
  return f;
}

void store(void* window, int64_t i, double value, int type) {
  if (type == MFAC_FLOAT64) {
    static_cast<double*>(window)[i] = value;
    return;
  }
  const float f = static_cast<float>(value);
  if (type == MFAC_FLOAT32) {
    static_cast<float*>(window)[i] = f;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  static_cast<uint16_t*>(window)[i] = static_cast<uint16_t>(bits >> 16);
}

int failures = 0;

void judge(const char* what, int64_t m, int64_t d, int64_t stride, int type, bool wide, double worst, int error) {
  const bool good = error == 0 && worst <= 1;  // false for NaN
  std::printf("%-8s m %5lld d %7lld stride %7lld type %d wide %d: error / allowed %.3f%s\n", what, static_cast<long long>(m),
              static_cast<long long>(d), static_cast<long long>(stride), type, wide, worst,
              good ? "" : error ? mfac_error_text(error) : " WRONG");
  failures += !good;
}

template <typename A>
void check_passes(int64_t m, int64_t d, int64_t stride, int64_t offset, int type) {
  const bool wide = sizeof(A) == 8;
  const double unit = wide ? 1e-14 : 1e-6;
  const int64_t size = type == MFAC_FLOAT64 ? 8 : type == MFAC_FLOAT32 ? 4 : 2;
  const int64_t length = m > 0 && d > 0 ? offset + (m - 1) * stride + d : offset;
  Buffer<unsigned char> memory(length * size, 0);
  void* window = memory.data + offset * size;
  std::vector<double> g(m * d);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      g[i * d + j] = rounded(draw(), type);
      store(window, i * stride + j, g[i * d + j], type);
    }
  }
  Buffer<A> x(d), w(m), sum(d);
  Buffer<double> out(m), scratch(mfac_row_dots_scratch(m, d));
  for (int64_t j = 0; j < d; ++j) x.data[j] = static_cast<A>(draw());
  for (int64_t i = 0; i < m; ++i) w.data[i] = static_cast<A>(draw());

  int error = mfac_row_dots(window, type, stride, m, d, x.data, wide, scratch.data, out.data, nullptr);
  cudaDeviceSynchronize();
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    double exact = 0, squares = 0, norm = 0;
    for (int64_t j = 0; j < d; ++j) {
      exact += g[i * d + j] * x.data[j];
      squares += g[i * d + j] * g[i * d + j];
      norm += static_cast<double>(x.data[j]) * x.data[j];
    }
    const double off = std::fabs(out.data[i] - exact) / (unit * std::sqrt(squares * norm) + 1e-300);
    if (!(off <= worst)) worst = off;
  }
  judge("row_dots", m, d, stride, type, wide, worst, error);

  for (const bool with_x : {false, true}) {
    for (int64_t j = 0; j < d; ++j) sum.data[j] = std::numeric_limits<A>::quiet_NaN();
    error = mfac_combine(window, type, stride, m, d, w.data, with_x ? x.data : nullptr, 0.5, sum.data, wide, nullptr);
    cudaDeviceSynchronize();
    worst = 0;
    for (int64_t j = 0; j < d; ++j) {
      double exact = with_x ? 0.5 * x.data[j] : 0, scale = std::fabs(exact);
      for (int64_t i = 0; i < m; ++i) {
        exact += w.data[i] * g[i * d + j];
        scale += std::fabs(w.data[i] * g[i * d + j]);
      }
      const double off = std::fabs(sum.data[j] - exact) / (unit * scale + 1e-300);
      if (!(off <= worst)) worst = off;
    }
    judge("combine", m, d, stride, type, wide, worst, error);
  }
}

template <typename A>
void check_coefficients(int64_t m) {
  const bool wide = sizeof(A) == 8;
  const double unit = wide ? 1e-12 : 1e-4;
  Buffer<A> lower(m * m), inverse(m * m), x(m), product(m);
  for (int64_t i = 0; i < m * m; ++i) lower.data[i] = static_cast<A>(i / m > i % m ? draw() / std::sqrt(m) : i / m == i % m);
  for (int64_t i = 0; i < m; ++i) x.data[i] = static_cast<A>(draw());
  int error = mfac_unit_lower_inverse(lower.data, wide, m, inverse.data, nullptr);
  cudaDeviceSynchronize();
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < m; ++k) {
      double cell = 0;
      for (int64_t j = 0; j <= i; ++j) cell += static_cast<double>(lower.data[i * m + j]) * inverse.data[j * m + k];
      const double off = std::fabs(cell - (i == k)) / unit;
      if (!(off <= worst)) worst = off;
    }
  }
  judge("inverse", m, m, m, wide ? MFAC_FLOAT64 : MFAC_FLOAT32, wide, worst, error);
  for (const bool transposed : {false, true}) {
    for (int64_t i = 0; i < m; ++i) product.data[i] = std::numeric_limits<A>::quiet_NaN();
    error = mfac_lower_product(inverse.data, wide, transposed, m, x.data, product.data, nullptr);
    cudaDeviceSynchronize();
    worst = 0;
    for (int64_t i = 0; i < m; ++i) {
      double exact = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (transposed ? j >= i : j <= i) exact += static_cast<double>(inverse.data[transposed ? j * m + i : i * m + j]) * x.data[j];
      }
      const double off = std::fabs(product.data[i] - exact) / (unit * std::sqrt(m));
      if (!(off <= worst)) worst = off;
    }
    judge("product", m, m, m, wide ? MFAC_FLOAT64 : MFAC_FLOAT32, wide, worst, error);
  }
}

}  // namespace

// With any argument only what is needed to meet every line of the kernels.
int main(int argc, char**) {
  const bool few = argc > 1;
  // Whole and broken groups of 8 rows; columns below, at and above packs and chunks of 8,192; weights beyond 1,024 rows.
  const int64_t shapes[][2] = {{1, 1}, {3, 5}, {8, 64}, {9, 8192}, {7, 8193}, {17, 16385}, {1025, 33}, {2, 0}, {0, 3}};
  for (const auto& shape : shapes) {
    const int64_t m = shape[0], d = shape[1], padded = (d + 15) / 16 * 16;
    if (few && m != 3 && d != 8193) continue;
    for (const int type : {MFAC_FLOAT32, MFAC_BFLOAT16, MFAC_FLOAT64}) {
      if (type != MFAC_FLOAT64) check_passes<float>(m, d, padded, 0, type);  // packs of 16 bytes
      check_passes<double>(m, d, d, 0, type);
    }
    check_passes<float>(m, d, padded + 2, 0, MFAC_FLOAT32);  // of 8 bytes
    check_passes<float>(m, d, padded, 1, MFAC_FLOAT32);      // of 4
    check_passes<float>(m, d, padded + 4, 0, MFAC_BFLOAT16);
    check_passes<float>(m, d, padded, 2, MFAC_BFLOAT16);
    check_passes<float>(m, d, padded + 1, 0, MFAC_BFLOAT16);
  }
  for (const int64_t m : {1, 2, 31, 32, 33, 70}) {
    if (few && m != 33) continue;
    check_coefficients<float>(m);
    check_coefficients<double>(m);
  }
  // Weights that need shared memory twice.
  if (few) check_passes<float>(1025, 33, 33, 0, MFAC_FLOAT32);
  std::printf("%d failures\n", failures);
  return failures > 99 ? 99 : failures;
}

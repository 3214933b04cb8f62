// Stands in for CUDA's header, so that mfac_kernels.cu compiles as C++20 and runs on the processor: a block is as many threads as
// on a GPU, __syncthreads is a barrier, and the blocks of a grid run one after the other. What a GPU does with warps and with memory
// is not emulated.

#pragma once

#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one for all threads; blocks do not run at the same time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an emulated error"; }

template <typename T>
cudaError_t cudaMallocManaged(T** p, size_t bytes) {
  *p = static_cast<T*>(std::malloc(bytes));
  return cudaSuccess;
}
inline void cudaFree(void* p) { std::free(p); }
inline void cudaDeviceSynchronize() {}

inline thread_local dim3 threadIdx, blockIdx;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename F>
cudaError_t emulate(dim3 grid, unsigned threads, F kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.x > 0x7fffffff || grid.y > 65535 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  std::barrier<> inside(threads), between(threads);
  block_barrier = &inside;
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      threadIdx = dim3(t, 0, 0);
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, 0);
          kernel();
          between.arrive_and_wait();
        }
      }
    });
  }
  for (std::thread& member : team) member.join();
  return cudaSuccess;
}

#define MFAC_LAUNCH(kernel, grid, threads, stream, ...)                                                                      \
  do {                                                                                                                       \
    (void)(stream);                                                                                                          \
    if (const cudaError_t error = emulate(grid, threads, [&] { (kernel)(__VA_ARGS__); }); error != cudaSuccess) return error; \
  } while (false)

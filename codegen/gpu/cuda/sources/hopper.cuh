// Names for what only Hopper has: bulk copies of tensor tiles, barriers that count their bytes, warpgroup products.
//
// A tile in shared memory is rows of 128 bytes, whose 16-byte parts are swizzled by the row: bits 4 to 6 of an address
// are combined with bits 7 to 9. Tiles start at multiples of 1024 bytes. The products themselves, `Wgmma`, are written
// by `codegen/gpu/cuda/wgmma.py`: their operand lists are as long as their tiles.
#pragma once
#include "attention.cuh"
#include "gemm.cuh"

#ifndef NAS_EMULATE
#include <cuda.h>

namespace nas {

using TensorMap = CUtensorMap;

// d[64, columns] (+)= a[64, 16] b[16, columns] by the four warps of a group; b is [columns, 16] in shared memory, or
// [16, columns] where `transposed`. `shared` takes a from shared memory too, `registers` from fragments.
template <typename Type, int columns, bool transposed>
struct Wgmma;

__device__ inline void barrier_start(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ inline void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended.
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

__device__ inline void tile_load(void* to, const TensorMap& map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void tile_load(void* to, const TensorMap& map, uint64_t* barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving uses of accumulators over this point.
template <int tiles>
__device__ inline void wgmma_hold(float (&d)[tiles][4]) {
#pragma unroll
  for (int j = 0; j < tiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[j][i])::"memory");
}

template <int registers>
__device__ inline void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers>
__device__ inline void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}

}  // namespace nas
#endif

namespace nas {

// Describes a swizzled tile: `leading` bytes between neighbouring blocks of 64 where the tile is transposed, 1024 bytes
// between groups of eight rows. Source: PTX ISA 8.8, section 9.7.15.5.1.2, matrix descriptors.
__device__ inline uint64_t tile_descriptor(const void* tile, int leading) {
  uint64_t start = shared_address(tile);
  return (start & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace nas

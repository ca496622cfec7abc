// Thin names for the instructions that the kernels use: copies to shared memory, matrix loads, tensor-core products.
//
// Elements of 16 bits are `uint16_t` everywhere; `Bf16` and `Fp16` say what the bits mean. With NAS_EMULATE the same
// names come from a header of the tests that runs a block's threads on a CPU.
#pragma once
#include <cstdint>

#ifdef NAS_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace nas {

struct Bf16 {
  static __device__ float read(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
  static __device__ uint32_t pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t&>(both);
  }
  static __device__ uint16_t write(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

struct Fp16 {
  static __device__ float read(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ uint32_t pack(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t&>(both);
  }
  static __device__ uint16_t write(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory in the background; zeros where `valid` is false.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int pending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], in float32.
template <typename Type>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest number of 11 bits, as bits of a float32.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ inline float from_bits(uint32_t bits) { return __uint_as_float(bits); }

// d[16, 8] += a[16, 8] b[8, 8] of numbers of 11 bits, in float32.
__device__ inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char nas_dynamic_shared[];
  return nas_dynamic_shared;
}

}  // namespace nas
#endif

namespace nas {

constexpr float kLog2E = 1.4426950408889634f;

// Sum or maximum over the four lanes that hold one row of an accumulator.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Writes two neighbours, rounded where the memory holds 16 bits.
template <typename Type>
__device__ inline void store_pair(uint16_t* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = Type::pack(low, high);
}
template <typename Type>
__device__ inline void store_pair(float* to, float low, float high) {
  to[0] = low;
  to[1] = high;
}

// Writes one element alike.
template <typename Type>
__device__ inline void store_element(uint16_t* to, float value) {
  *to = Type::write(value);
}
template <typename Type>
__device__ inline void store_element(float* to, float value) {
  *to = value;
}

// A number for each head, known when an entry is compiled.
template <int heads>
struct Constants {
  float of[heads];
};

// Numbers as sums of two of 11 bits each: together 22 of the 24 bits of float32.
template <int count>
struct Split {
  uint32_t high[count], low[count];
  __device__ explicit Split(const float (&from)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      high[i] = to_tf32(from[i]);
      low[i] = to_tf32(from[i] - from_bits(high[i]));
    }
  }
};

// d += a b as exactly as float32 sums are, by three products, the smallest terms first. The sum over many of them is
// made outside: tensor cores cut what they do not hold instead of rounding. Source: Ootomo and Yokota, 2022.
__device__ inline void multiply_split(float (&d)[4], const Split<4>& a, const Split<2>& b) {
  float sums[4] = {};
  multiply_tf32(sums, a.low, b.high);
  multiply_tf32(sums, a.high, b.low);
  multiply_tf32(sums, a.high, b.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sums[i];
}

}  // namespace nas

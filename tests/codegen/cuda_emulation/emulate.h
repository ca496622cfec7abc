// Runs the text of a CUDA kernel on a CPU: a block's threads are fibres that take turns at barriers and warp functions.
//
// Covered: indices, fragment layouts of ldmatrix and mma, zero filling, waits for background copies (a copy happens no
// earlier than its wait), barriers that not everybody reaches, rounding of stored elements, that sums of TF32 are cut.
// Every other block takes its threads from the last on, which shows some races.
// Not covered: other races between barriers, memory ordering, bank conflicts, registers, alignment faults, approximations of
// ex2, the order of additions inside a tensor core. Reads past the end of a tensor are left to the caller's sanitizer.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using std::max;
using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  bool valid;
};
struct Fibre {
  std::unique_ptr<char[]> stack;
  jmp_buf state;
  ucontext_t start;
  bool started = false, done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
struct Meeting {
  int arrived = 0;
  long generation = 0;
};
struct Warp {
  Meeting meeting;
  int parity = 0;
  uint64_t words[2][32][8];
};

inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline std::vector<Meeting> named(16);
inline std::vector<unsigned char> shared;
inline unsigned current = 0;
inline long idle = 0;
inline jmp_buf scheduler;
inline std::function<void()> body;
constexpr size_t kStack = 1 << 18;

inline void progress() { idle = 0; }

inline void yield() {
  if (++idle > 4L * 1000 * 1000) {
    std::fprintf(stderr, "deadlock: thread %u of block (%u, %u, %u) waits for ever\n", current, blockIdx.x, blockIdx.y,
                 blockIdx.z);
    std::exit(4);
  }
  if (!_setjmp(fibres[current].state)) _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting, int count) {
  long generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
    progress();
    return;
  }
  while (meeting.generation == generation) yield();
}

inline void enter() {
  body();
  fibres[current].done = true;
  _longjmp(scheduler, 1);
}

inline void run_block(unsigned threads) {
  fibres.clear();
  fibres.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  named.assign(16, Meeting());
  for (unsigned left = threads; left;) {
    left = 0;
    for (unsigned i = 0; i < threads; ++i) {
      volatile unsigned turn = i;
      unsigned at = (blockIdx.x + blockIdx.y) % 2 ? threads - 1 - turn : turn;
      Fibre& fibre = fibres[at];
      if (fibre.done) continue;
      ++left;
      current = at;
      threadIdx = dim3(at, 0, 0);
      if (_setjmp(scheduler)) {
        i = turn;
        continue;
      }
      if (fibre.started) _longjmp(fibre.state, 1);
      fibre.started = true;
      fibre.stack.reset(new char[kStack]);
      getcontext(&fibre.start);
      fibre.start.uc_stack.ss_sp = fibre.stack.get();
      fibre.start.uc_stack.ss_size = kStack;
      fibre.start.uc_link = nullptr;
      makecontext(&fibre.start, enter, 0);
      setcontext(&fibre.start);
    }
  }
}

// Runs `kernel` for each block of a grid; shared memory starts as NaN, as nothing says what it holds.
inline void launch(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  blockDim = dim3(threads);
  shared.resize(shared_bytes + 1024);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::fill(shared.begin(), shared.end(), 0xff);
        run_block(threads);
      }
}

// Gives every lane of a warp what each of them brought. Words alternate between two places: a lane reads one while
// others write the next.
inline uint64_t (*exchange(const uint64_t* mine, int count))[8] {
  Warp& warp = warps[current / 32];
  int parity = warp.parity;
  std::copy(mine, mine + count, warp.words[parity][current % 32]);
  int lanes = std::min<int>(32, int(fibres.size()) - int(current / 32 * 32));
  if (warp.meeting.arrived + 1 == lanes) warp.parity = 1 - parity;
  meet(warp.meeting, lanes);
  return warp.words[parity];
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::named[0], int(emulation::fibres.size())); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::exchange(nullptr, 0); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  uint64_t word = 0;
  std::memcpy(&word, &value, 4);
  auto all = emulation::exchange(&word, 1);
  float found;
  std::memcpy(&found, all[(emulation::current % 32) ^ mask], 4);
  return found;
}
inline float __shfl_sync(unsigned, float value, int lane) {
  uint64_t word = 0;
  std::memcpy(&word, &value, 4);
  auto all = emulation::exchange(&word, 1);
  float found;
  std::memcpy(&found, all[lane], 4);
  return found;
}
inline float __fdividef(float a, float b) { return a / b; }

namespace nas {

struct Bf16 {
  static float read(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static uint16_t write(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static uint32_t pack(float low, float high) { return write(low) | uint32_t(write(high)) << 16; }
};

struct Fp16 {
  static float read(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
  }
  static uint16_t write(float value) {
    _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  static uint32_t pack(float low, float high) { return write(low) | uint32_t(write(high)) << 16; }
};

inline void copy_async(void* to, const void* from, bool valid) {
  emulation::fibres[emulation::current].open.push_back({to, from, valid});
}
inline void copy_commit() {
  auto& fibre = emulation::fibres[emulation::current];
  fibre.groups.push_back(std::move(fibre.open));
  fibre.open.clear();
}
template <int pending>
inline void copy_wait() {
  auto& groups = emulation::fibres[emulation::current].groups;
  for (; groups.size() > size_t(pending); groups.pop_front())
    for (auto& copy : groups.front())
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  uint64_t word = reinterpret_cast<uint64_t>(row);
  auto all = emulation::exchange(&word, 1);
  unsigned lane = emulation::current % 32;
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], reinterpret_cast<const char*>(all[8 * m + lane / 4][0]) + 4 * (lane % 4), 4);
  __syncwarp();
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  uint64_t word = reinterpret_cast<uint64_t>(row);
  auto all = emulation::exchange(&word, 1);
  unsigned lane = emulation::current % 32;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      pair[i] = reinterpret_cast<const uint16_t*>(all[8 * m + 2 * (lane % 4) + i][0])[lane / 4];
    std::memcpy(&r[m], pair, 4);
  }
  __syncwarp();
}

template <typename Type>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto all = emulation::exchange(mine, 6);
  unsigned lane = emulation::current % 32, group = lane / 4, pair = lane % 4;
  auto half = [](uint64_t word, int which) { return Type::read(uint16_t(word >> (16 * which))); };
  for (int i = 0; i < 4; ++i) {
    unsigned column = 2 * pair + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      unsigned from = k % 8 / 2;
      float x = half(all[4 * group + from][(i / 2) + 2 * (k / 8)], k % 2);
      float y = half(all[4 * column + from][4 + k / 8], k % 2);
      sum += double(x) * y;
    }
    d[i] = float(sum);
  }
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x1000) & ~0x1fffu;  // ties away from zero
}
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint64_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  auto all = emulation::exchange(mine, 6);
  unsigned lane = emulation::current % 32, group = lane / 4, pair = lane % 4;
  auto read = [](uint64_t word) { return from_bits(uint32_t(word) & ~0x1fffu); };  // the unit ignores lower bits
  for (int i = 0; i < 4; ++i) {
    unsigned column = 2 * pair + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += double(read(all[4 * group + k % 4][(i / 2) + 2 * (k / 4)])) * read(all[4 * column + k % 4][4 + k / 4]);
    d[i] = float(sum);
    if (std::abs(d[i]) > std::abs(sum)) d[i] = std::nextafterf(d[i], 0.0f);  // the unit cuts what it does not hold
  }
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline unsigned char* dynamic_shared() {
  auto start = reinterpret_cast<uintptr_t>(emulation::shared.data());
  return emulation::shared.data() + ((1024 - start % 1024) % 1024);
}

}  // namespace nas

#include "emulate_hopper.h"

// c[M, N] = activation(a[M, K] w[N, K]^T + bias[N]) + residual[M, N], on tensor cores with sums in float32.
//
// A block makes a tile of c, its warps parts of it. Tiles of a and w come through four buffers of shared memory. K and N
// are multiples of 8; M is any. Runs from sm_80 on.
#pragma once
#include "tensor.cuh"

namespace nas {

enum Activation { kIdentity, kRelu, kGelu, kSilu };

template <int activation>
__device__ inline float activate(float x) {
  if (activation == kRelu) return fmaxf(x, 0.0f);
  if (activation == kGelu) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if (activation == kSilu) return x / (1.0f + expf(-x));
  return x;
}

// What a block makes: `rows` x `columns` of c in steps of `depth`, by `down` x `across` warps.
template <int rows, int columns, int depth, int down, int across>
struct GemmTile {
  static constexpr int kRows = rows, kColumns = columns, kDepth = depth, kStages = 4, kThreads = 32 * down * across;
  static constexpr int kDown = down, kAcross = across;
  static constexpr int kWarpRows = rows / down, kWarpColumns = columns / across;
  static constexpr int kHigh = kWarpRows / 16, kWide = kWarpColumns / 8;  // tiles of 16 x 8 of a warp
  static constexpr int kStride = depth + 8;  // an odd number of 16 bytes: rows fall into different banks
  static constexpr int kStageElements = (rows + columns) * kStride;
  static constexpr int kSharedBytes = kStages * kStageElements * 2;
};

// Starts copying `count` rows of a step's columns, from `first_row` and `first_column` on.
template <typename Tile, int count>
__device__ inline void gemm_load(uint16_t* to, const uint16_t* from, int first_row, int rows, int first_column,
                                 int columns) {
  constexpr int kChunks = Tile::kDepth / 8;
  for (int chunk = threadIdx.x; chunk < count * kChunks; chunk += Tile::kThreads) {
    int row = chunk / kChunks, column = chunk % kChunks * 8;
    bool valid = first_row + row < rows && first_column + column < columns;
    const uint16_t* source = valid ? from + int64_t(first_row + row) * columns + first_column + column : from;
    copy_async(to + row * Tile::kStride + column, source, valid);
  }
}

// Adds one stage's product to a warp's part of the tile.
template <typename Type, typename Tile>
__device__ inline void gemm_stage(float (&sums)[Tile::kHigh][Tile::kWide][4], const uint16_t* a, const uint16_t* w,
                                  int warp_row, int warp_column, int lane) {
  constexpr int kStride = Tile::kStride;
#pragma unroll
  for (int k = 0; k < Tile::kDepth; k += 16) {
    uint32_t rows[Tile::kHigh][4], columns[Tile::kWide / 2][4];
#pragma unroll
    for (int i = 0; i < Tile::kHigh; ++i)
      load_matrices(rows[i], a + (warp_row + 16 * i + lane % 16) * kStride + k + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < Tile::kWide / 2; ++j)
      load_matrices(columns[j],
                    w + (warp_column + 16 * j + lane / 16 * 8 + lane % 8) * kStride + k + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < Tile::kHigh; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kWide; ++j)
        multiply<Type>(sums[i][j], rows[i], columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]);
  }
}

template <typename Type>
__device__ inline float read_element(const uint16_t* from) {
  return Type::read(*from);
}
template <typename Type>
__device__ inline float read_element(const float* from) {
  return *from;
}

// The two neighbours c[row, column], c[row, column + 1] from their sums; bias and residual may be null.
template <typename Type, int activation, typename Out>
__device__ inline void gemm_finish(Out* c, const float* bias, const Out* residual, int columns, int row, int column,
                                   float low, float high) {
  if (bias) {
    low += bias[column];
    high += bias[column + 1];
  }
  low = activate<activation>(low);
  high = activate<activation>(high);
  int64_t place = int64_t(row) * columns + column;
  if (residual) {
    low += read_element<Type>(residual + place);
    high += read_element<Type>(residual + place + 1);
  }
  store_pair<Type>(c + place, low, high);
}

template <typename Type, int activation, typename Out, typename Tile>
__device__ void gemm(const uint16_t* a, const uint16_t* w, const float* bias, const Out* residual, Out* c, int rows,
                     int columns, int depth) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int first_row = blockIdx.y * Tile::kRows, first_column = blockIdx.x * Tile::kColumns;
  int warp_row = warp / Tile::kAcross * Tile::kWarpRows, warp_column = warp % Tile::kAcross * Tile::kWarpColumns;
  int steps = (depth + Tile::kDepth - 1) / Tile::kDepth;
  auto load = [&](int step) {
    if (step < steps) {
      uint16_t* stage = shared + step % Tile::kStages * Tile::kStageElements;
      gemm_load<Tile, Tile::kRows>(stage, a, first_row, rows, step * Tile::kDepth, depth);
      gemm_load<Tile, Tile::kColumns>(stage + Tile::kRows * Tile::kStride, w, first_column, columns,
                                      step * Tile::kDepth, depth);
    }
    copy_commit();
  };
  float sums[Tile::kHigh][Tile::kWide][4] = {};
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    copy_wait<Tile::kStages - 2>();
    __syncthreads();
    load(step + Tile::kStages - 1);
    const uint16_t* stage = shared + step % Tile::kStages * Tile::kStageElements;
    gemm_stage<Type, Tile>(sums, stage, stage + Tile::kRows * Tile::kStride, warp_row, warp_column, lane);
  }
#pragma unroll
  for (int i = 0; i < Tile::kHigh; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kWide; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = first_row + warp_row + 16 * i + 8 * half + lane / 4;
        int column = first_column + warp_column + 8 * j + lane % 4 * 2;
        if (row < rows && column < columns)
          gemm_finish<Type, activation>(c, bias, residual, columns, row, column, sums[i][j][2 * half],
                                        sums[i][j][2 * half + 1]);
      }
}

}  // namespace nas

// The product of gemm.cuh for Hopper: c = activation(a w^T + bias) + residual.
//
// One warpgroup copies tiles of a and w into a ring of buffers, two others multiply: 64 x 256 of c each, so that a block
// makes 128 x 256. As many blocks as multiprocessors go through the tiles of c, so the next tile's operands come while
// the last one's results are written.
#pragma once
#include "hopper.cuh"

namespace nas {

struct HopperGemmTile {
  static constexpr int kRows = 128, kColumns = 256, kDepth = 64, kStages = 4, kThreads = 384, kBand = 16;
  static constexpr int kLeftBytes = kRows * kDepth * 2, kStageBytes = (kRows + kColumns) * kDepth * 2;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16);
};

// The place of a tile: bands of 16 tiles of rows, so that what runs at once shares its operands in the cache.
__device__ inline void gemm_place(int tile, int tile_rows, int tile_columns, int& row, int& column) {
  constexpr int kBand = HopperGemmTile::kBand;
  int band = tile / (kBand * tile_columns), within = tile % (kBand * tile_columns);
  int height = min(kBand, tile_rows - band * kBand);
  row = band * kBand + within % height;
  column = within / height;
}

template <typename Type, int activation, typename Out>
__device__ void hopper_gemm(const TensorMap& a, const TensorMap& w, const float* bias, const Out* residual, Out* c,
                            int rows, int columns, int depth) {
  using Tile = HopperGemmTile;
  unsigned char* shared = dynamic_shared();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Tile::kStages * Tile::kStageBytes);
  uint64_t* empty = full + Tile::kStages;
  int tile_rows = (rows + Tile::kRows - 1) / Tile::kRows, tile_columns = (columns + Tile::kColumns - 1) / Tile::kColumns;
  int tiles = tile_rows * tile_columns, steps = (depth + Tile::kDepth - 1) / Tile::kDepth;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_start(full + stage, 1);
      barrier_start(empty + stage, 2);
    }
    barrier_fence();
  }
  __syncthreads();
  int group = threadIdx.x / 128, number = 0, row, column;
  if (group == 0) {
    registers_lower<40>();
    if (threadIdx.x == 0)
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        gemm_place(tile, tile_rows, tile_columns, row, column);
        for (int step = 0; step < steps; ++step, ++number) {
          int stage = number % Tile::kStages;
          unsigned char* to = shared + stage * Tile::kStageBytes;
          barrier_wait(empty + stage, (number / Tile::kStages + 1) % 2);
          barrier_expect(full + stage, Tile::kStageBytes);
          tile_load(to, a, full + stage, step * Tile::kDepth, row * Tile::kRows);
          tile_load(to + Tile::kLeftBytes, w, full + stage, step * Tile::kDepth, column * Tile::kColumns);
        }
      }
  } else {
    registers_raise<232>();
    int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    bool speaks = threadIdx.x % 128 == 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      gemm_place(tile, tile_rows, tile_columns, row, column);
      float sums[Tile::kColumns / 8][4];
      for (int step = 0; step < steps; ++step, ++number) {
        int stage = number % Tile::kStages;
        const unsigned char* from = shared + stage * Tile::kStageBytes;
        barrier_wait(full + stage, number / Tile::kStages % 2);
        uint64_t left = tile_descriptor(from + (group - 1) * 64 * Tile::kDepth * 2, 16);
        uint64_t right = tile_descriptor(from + Tile::kLeftBytes, 16);
        wgmma_hold(sums);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Tile::kDepth / 16; ++k)
          Wgmma<Type, Tile::kColumns, false>::shared(sums, left + 2 * k, right + 2 * k, step + k > 0);
        wgmma_commit();
        wgmma_hold(sums);
        wgmma_wait<1>();
        if (step > 0 && speaks) barrier_arrive(empty + (number - 1) % Tile::kStages);
      }
      wgmma_wait<0>();
      wgmma_hold(sums);
      if (speaks) barrier_arrive(empty + (number - 1) % Tile::kStages);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int at = row * Tile::kRows + (group - 1) * 64 + 16 * warp + 8 * half + lane / 4;
#pragma unroll
        for (int j = 0; j < Tile::kColumns / 8; ++j) {
          int place = column * Tile::kColumns + 8 * j + lane % 4 * 2;
          if (at < rows && place < columns)
            gemm_finish<Type, activation>(c, bias, residual, columns, at, place, sums[j][2 * half],
                                          sums[j][2 * half + 1]);
        }
      }
    }
  }
}

}  // namespace nas

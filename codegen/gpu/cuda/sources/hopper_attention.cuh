// The attention of attention.cuh for Hopper: o = softmax(scale q k^T) v, causal or not, heads of 128 features.
//
// A block takes 128 queries of one head: a warpgroup copies, two others take 64 queries each. Keys and values come in
// tiles of 128 through two buffers each. The scores of the next keys are multiplied while the softmax of the last ones
// runs (Shah et al., FlashAttention-3, 2024).
#pragma once
#include "hopper.cuh"

namespace nas {

struct HopperAttentionTile {
  static constexpr int kHead = 128, kQueries = 128, kKeys = 128, kThreads = 384, kStages = 2;
  static constexpr int kHalfBytes = 128 * 64 * 2, kTileBytes = 2 * kHalfBytes;  // 128 rows, 64 features a half
  static constexpr int kSharedBytes = (1 + 2 * kStages) * kTileBytes + (1 + 4 * kStages) * 8;
};

// Full and empty buffers of keys or of values, in shared memory.
struct Ring {
  unsigned char* tiles;
  uint64_t *full, *empty;

  __device__ unsigned char* tile(int block) const {
    return tiles + block % HopperAttentionTile::kStages * HopperAttentionTile::kTileBytes;
  }
  __device__ void fill(const TensorMap& map, int block, int head, int batch) const {
    int stage = block % HopperAttentionTile::kStages;
    barrier_wait(empty + stage, (block / HopperAttentionTile::kStages + 1) % 2);
    barrier_expect(full + stage, HopperAttentionTile::kTileBytes);
    for (int half = 0; half < 2; ++half)
      tile_load(tile(block) + half * HopperAttentionTile::kHalfBytes, map, full + stage, 64 * half, head,
                block * HopperAttentionTile::kKeys, batch);
  }
  __device__ void wait(int block) const {
    barrier_wait(full + block % HopperAttentionTile::kStages, block / HopperAttentionTile::kStages % 2);
  }
  __device__ void release(int block, bool speaks) const {
    if (speaks) barrier_arrive(empty + block % HopperAttentionTile::kStages);
  }
};

// scores[64, 128] = q k^T; starts it only.
template <typename Type>
__device__ inline void hopper_scores(float (&scores)[16][4], const unsigned char* queries, const unsigned char* keys) {
  using Tile = HopperAttentionTile;
#pragma unroll
  for (int k = 0; k < Tile::kHead / 16; ++k) {
    uint64_t left = tile_descriptor(queries + k / 4 * Tile::kHalfBytes, 16) + k % 4 * 2;
    uint64_t right = tile_descriptor(keys + k / 4 * Tile::kHalfBytes, 16) + k % 4 * 2;
    Wgmma<Type, Tile::kKeys, false>::shared(scores, left, right, k > 0);
  }
  wgmma_commit();
}

// sums[64, 128] += weights v; starts it only.
template <typename Type>
__device__ inline void hopper_values(float (&sums)[16][4], const uint32_t (&weights)[8][4],
                                     const unsigned char* values) {
  using Tile = HopperAttentionTile;
#pragma unroll
  for (int s = 0; s < Tile::kKeys / 16; ++s)
    Wgmma<Type, Tile::kHead, true>::registers(sums, weights[s], tile_descriptor(values + s * 16 * 128, Tile::kHalfBytes),
                                              1);
  wgmma_commit();
}

template <typename Type>
__device__ inline void hopper_pack(uint32_t (&weights)[8][4], const float (&scores)[16][4]) {
#pragma unroll
  for (int s = 0; s < 8; ++s)
#pragma unroll
    for (int part = 0; part < 4; ++part)
      weights[s][part] =
          Type::pack(scores[2 * s + part / 2][part % 2 * 2], scores[2 * s + part / 2][part % 2 * 2 + 1]);
}

template <typename Type, bool causal>
__device__ void hopper_attention(const TensorMap& q, const TensorMap& k, const TensorMap& v, uint16_t* o, int queries,
                                 int keys, int heads, int key_heads, float scale, Strides o_strides) {
  using Tile = HopperAttentionTile;
  unsigned char* q_shared = dynamic_shared();
  unsigned char* k_shared = q_shared + Tile::kTileBytes;
  unsigned char* v_shared = k_shared + Tile::kStages * Tile::kTileBytes;
  uint64_t* q_full = reinterpret_cast<uint64_t*>(v_shared + Tile::kStages * Tile::kTileBytes);
  Ring key_ring{k_shared, q_full + 1, q_full + 1 + Tile::kStages};
  Ring value_ring{v_shared, q_full + 1 + 2 * Tile::kStages, q_full + 1 + 3 * Tile::kStages};
  int batch = blockIdx.y / heads, head = blockIdx.y % heads, key_head = head / (heads / key_heads);
  int first = (gridDim.x - 1 - blockIdx.x) * Tile::kQueries, offset = keys - queries;
  int last = causal ? min(keys, first + Tile::kQueries + offset) : keys;
  int blocks = (last + Tile::kKeys - 1) / Tile::kKeys;
  if (threadIdx.x == 0) {
    barrier_start(q_full, 1);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_start(key_ring.full + stage, 1);
      barrier_start(value_ring.full + stage, 1);
      barrier_start(key_ring.empty + stage, 2);
      barrier_start(value_ring.empty + stage, 2);
    }
    barrier_fence();
  }
  __syncthreads();
  int group = threadIdx.x / 128;
  if (group == 0) {
    registers_lower<40>();
    if (threadIdx.x == 0) {
      barrier_expect(q_full, Tile::kTileBytes);
      for (int half = 0; half < 2; ++half)
        tile_load(q_shared + half * Tile::kHalfBytes, q, q_full, 64 * half, head, first, batch);
      for (int block = 0; block < blocks; ++block) {
        key_ring.fill(k, block, key_head, batch);
        value_ring.fill(v, block, key_head, batch);
      }
    }
  } else {
    registers_raise<232>();
    int lane = threadIdx.x % 32, row = first + (group - 1) * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    int limit = causal ? row + offset + 1 : keys;
    bool speaks = threadIdx.x % 128 == 0;
    const unsigned char* mine = q_shared + (group - 1) * 64 * 128;
    float unit = scale * kLog2E, sums[16][4] = {}, scores[16][4], factors[2];
    uint32_t weights[8][4];
    Softmax state;
    auto mask = [&](int block) {
      int end = (block + 1) * Tile::kKeys;
      bool full = end <= keys && (!causal || end <= row - lane / 4 + offset + 1);
      attention_mask(scores, unit, block * Tile::kKeys + lane % 4 * 2, keys, limit, full);
    };
    barrier_wait(q_full, 0);
    if (blocks > 0) {
      key_ring.wait(0);
      wgmma_hold(scores);
      wgmma_fence();
      hopper_scores<Type>(scores, mine, key_ring.tile(0));
      wgmma_wait<0>();
      wgmma_hold(scores);
      key_ring.release(0, speaks);
      mask(0);
      attention_weigh(state, scores, factors);
      hopper_pack<Type>(weights, scores);
    }
    for (int block = 1; block < blocks; ++block) {
      key_ring.wait(block);
      value_ring.wait(block - 1);
      wgmma_hold(scores);
      wgmma_hold(sums);
      wgmma_fence();
      hopper_scores<Type>(scores, mine, key_ring.tile(block));
      hopper_values<Type>(sums, weights, value_ring.tile(block - 1));
      wgmma_wait<1>();
      wgmma_hold(scores);
      key_ring.release(block, speaks);
      mask(block);
      attention_weigh(state, scores, factors);
      wgmma_wait<0>();
      wgmma_hold(sums);
      value_ring.release(block - 1, speaks);
      attention_rescale(sums, factors);
      hopper_pack<Type>(weights, scores);
    }
    if (blocks > 0) {
      value_ring.wait(blocks - 1);
      wgmma_hold(sums);
      wgmma_fence();
      hopper_values<Type>(sums, weights, value_ring.tile(blocks - 1));
      wgmma_wait<0>();
      wgmma_hold(sums);
    }
    o += batch * o_strides.batch + head * o_strides.head;
    attention_store<Type>(o, o_strides.token, sums, state, row, queries, lane);
  }
}

}  // namespace nas

// o = softmax(scale q k^T) v, causal or not, without ever writing the scores to memory.
//
// A block of 256 threads takes 128 queries of one head, a warp 16 of them. Keys and values come in tiles of 64 through
// two buffers; the softmax is kept as a running maximum and sum (Milakov and Gimelshein, 2018; Dao et al., 2022).
// Several heads of queries may share one of keys. Runs from sm_80 on.
#pragma once
#include "tensor.cuh"

namespace nas {

// Elements between neighbours along an axis; the features of a head lie side by side.
struct Strides {
  int64_t batch, token, head;
};
struct GateStrides {
  int64_t batch, token, head, feature;
};

template <int kHead>
struct AttentionTile {
  static constexpr int kQueries = 128, kKeys = 64, kThreads = 256;
  static constexpr int kStride = kHead + 8;
  static constexpr int kTileElements = kKeys * kStride;
  static constexpr int kSharedBytes = (kQueries * kStride + 4 * kTileElements) * 2;
};

// Starts copying rows of one head; zeros beyond `tokens`.
template <int kHead>
__device__ inline void attention_load(uint16_t* to, const uint16_t* from, int64_t token_stride, int first, int count,
                                      int tokens) {
  for (int chunk = threadIdx.x; chunk < count * (kHead / 8); chunk += AttentionTile<kHead>::kThreads) {
    int row = chunk / (kHead / 8), column = chunk % (kHead / 8) * 8;
    bool valid = first + row < tokens;
    copy_async(to + row * AttentionTile<kHead>::kStride + column,
               valid ? from + (first + row) * token_stride + column : from, valid);
  }
}

// One row's share of the state of a softmax; a lane has two rows, eight apart.
struct Softmax {
  float top[2] = {-1e30f, -1e30f}, total[2] = {0.0f, 0.0f};
};

// Turns scores in units of log2 into weights, relative to the new maximum, and tells what scales the sums before.
template <int kTiles>
__device__ inline void attention_weigh(Softmax& state, float (&scores)[kTiles][4], float (&factors)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state.top[half], total = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
    top = quad_max(top);
    factors[half] = exp2_fast(state.top[half] - top);
    state.top[half] = top;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[j][i] = exp2_fast(scores[j][i] - top);
        total += scores[j][i];
      }
    state.total[half] = state.total[half] * factors[half] + total;
  }
}

template <int kOutputs>
__device__ inline void attention_rescale(float (&sums)[kOutputs][4], const float (&factors)[2]) {
#pragma unroll
  for (int j = 0; j < kOutputs; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] *= factors[i / 2];
}

// Brings the scores of keys `key`, `key + 1`, `key + 8`, ... to units of log2; those of keys not seen to nothing.
template <int kTiles>
__device__ inline void attention_mask(float (&scores)[kTiles][4], float unit, int key, int keys, int limit, bool full) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int place = key + 8 * j + i % 2;
      bool seen = full || place < min(keys, limit + i / 2 * 8);
      scores[j][i] = seen ? scores[j][i] * unit : -INFINITY;
    }
}

// Adds the products of a warp's 16 queries and a tile of keys to the scores; a lane's first key is 2 * (lane % 4).
template <typename Type, int kHead, int kTiles>
__device__ inline void attention_scores(float (&scores)[kTiles][4], const uint32_t (&query)[kHead / 16][4],
                                        const uint16_t* keys, int lane) {
#pragma unroll
  for (int s = 0; s < kHead / 16; ++s)
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t pair[4];
      load_matrices(pair, keys + (8 * j + lane / 16 * 8 + lane % 8) * (kHead + 8) + 16 * s + lane / 8 % 2 * 8);
      multiply<Type>(scores[j], query[s], pair[0], pair[1]);
      multiply<Type>(scores[j + 1], query[s], pair[2], pair[3]);
    }
}

// Adds a tile of values, each times its weight, to a warp's sums.
template <typename Type, int kHead, int kTiles>
__device__ inline void attention_mix(float (&sums)[kHead / 8][4], const float (&weights)[kTiles][4],
                                     const uint16_t* values, int lane) {
#pragma unroll
  for (int s = 0; s < kTiles / 2; ++s) {
    uint32_t rows[4] = {Type::pack(weights[2 * s][0], weights[2 * s][1]),
                        Type::pack(weights[2 * s][2], weights[2 * s][3]),
                        Type::pack(weights[2 * s + 1][0], weights[2 * s + 1][1]),
                        Type::pack(weights[2 * s + 1][2], weights[2 * s + 1][3])};
#pragma unroll
    for (int j = 0; j < kHead / 8; j += 2) {
      uint32_t pair[4];
      load_matrices_transposed(
          pair, values + (16 * s + lane / 8 % 2 * 8 + lane % 8) * (kHead + 8) + 8 * j + lane / 16 * 8);
      multiply<Type>(sums[j], rows, pair[0], pair[1]);
      multiply<Type>(sums[j + 1], rows, pair[2], pair[3]);
    }
  }
}

// Writes a warp's 16 rows, divided by their totals; `row` is the lane's first.
template <typename Type, int kOutputs, typename Out>
__device__ inline void attention_store(Out* o, int64_t token_stride, const float (&sums)[kOutputs][4],
                                       const Softmax& state, int row, int queries, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = quad_sum(state.total[half]), factor = total > 0.0f ? 1.0f / total : 0.0f;
    if (row + 8 * half < queries)
#pragma unroll
      for (int j = 0; j < kOutputs; ++j)
        store_pair<Type>(o + (row + 8 * half) * token_stride + 8 * j + lane % 4 * 2, sums[j][2 * half] * factor,
                         sums[j][2 * half + 1] * factor);
  }
}

template <typename Type, int kHead, bool causal>
__device__ void attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, int queries, int keys,
                          int heads, int key_heads, float scale, Strides q_strides, Strides k_strides,
                          Strides v_strides, Strides o_strides) {
  using Tile = AttentionTile<kHead>;
  constexpr int kStride = Tile::kStride, kSteps = kHead / 16, kTiles = Tile::kKeys / 8;
  uint16_t* q_shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* kv_shared = q_shared + Tile::kQueries * kStride;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int batch = blockIdx.y / heads, head = blockIdx.y % heads, key_head = head / (heads / key_heads);
  int first = (gridDim.x - 1 - blockIdx.x) * Tile::kQueries;  // long rows first
  int offset = keys - queries;                                // query i sees keys up to i + offset
  q += batch * q_strides.batch + head * q_strides.head;
  k += batch * k_strides.batch + key_head * k_strides.head;
  v += batch * v_strides.batch + key_head * v_strides.head;
  int last = causal ? min(keys, first + Tile::kQueries + offset) : keys;
  int blocks = (last + Tile::kKeys - 1) / Tile::kKeys;
  auto load = [&](int block) {
    if (block < blocks) {
      uint16_t* to = kv_shared + block % 2 * 2 * Tile::kTileElements;
      attention_load<kHead>(to, k, k_strides.token, block * Tile::kKeys, Tile::kKeys, keys);
      attention_load<kHead>(to + Tile::kTileElements, v, v_strides.token, block * Tile::kKeys, Tile::kKeys, keys);
    }
    copy_commit();
  };
  attention_load<kHead>(q_shared, q, q_strides.token, first, Tile::kQueries, queries);
  load(0);
  copy_wait<0>();
  __syncthreads();
  uint32_t query[kSteps][4];
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    load_matrices(query[s], q_shared + (16 * warp + lane % 16) * kStride + 16 * s + lane / 16 * 8);
  float sums[kHead / 8][4] = {}, unit = scale * kLog2E;
  Softmax state;
  for (int block = 0; block < blocks; ++block) {
    load(block + 1);
    copy_wait<1>();
    __syncthreads();
    const uint16_t* keys_here = kv_shared + block % 2 * 2 * Tile::kTileElements;
    const uint16_t* values_here = keys_here + Tile::kTileElements;
    float scores[kTiles][4] = {};
    attention_scores<Type, kHead>(scores, query, keys_here, lane);
    int row = first + 16 * warp + lane / 4, end = block * Tile::kKeys + Tile::kKeys;
    int limit = causal ? row + offset + 1 : keys;
    bool full = end <= keys && (!causal || end <= first + 16 * warp + offset + 1);
    attention_mask(scores, unit, block * Tile::kKeys + lane % 4 * 2, keys, limit, full);
    float factors[2];
    attention_weigh(state, scores, factors);
    attention_rescale(sums, factors);
    attention_mix<Type, kHead>(sums, scores, values_here, lane);
    __syncthreads();
  }
  o += batch * o_strides.batch + head * o_strides.head;
  attention_store<Type>(o, o_strides.token, sums, state, first + 16 * warp + lane / 4, queries, lane);
}

}  // namespace nas

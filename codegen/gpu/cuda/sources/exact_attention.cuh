// Attention of models in float32: as `model_attention`, with every product made of three of numbers of 11 bits.
//
// A block of `kWarps` warps takes 16 queries of one head a warp. Tiles of 64 keys come while values are mixed, those of
// values while scores are made. Runs from sm_80 on.
#pragma once
#include "model_attention.cuh"

namespace nas {

template <int kHead, int kWarps>
struct ExactAttentionTile {
  static constexpr int kQueries = 16 * kWarps, kThreads = 32 * kWarps, kKeys = 64, kStride = kHead + 4;
  static constexpr int kSharedBytes = (kQueries + 2 * kKeys) * kStride * 4;
};

// Starts copying 64 rows of one head; zeros beyond `tokens`.
template <int kHead, int kThreads>
__device__ inline void exact_load(float* to, const float* from, int64_t token_stride, int first, int tokens) {
  for (int chunk = threadIdx.x; chunk < 64 * (kHead / 4); chunk += kThreads) {
    int row = chunk / (kHead / 4), column = chunk % (kHead / 4) * 4;
    bool valid = first + row < tokens;
    copy_async(to + row * (kHead + 4) + column, valid ? from + (first + row) * token_stride + column : from, valid);
  }
  copy_commit();
}

template <int kHead, int kWarps, typename Out, int kSlopes>
__device__ void exact_attention(const float* q, const float* k, const float* v, const int* offset, const float* bias,
                                Out* o, AttentionRules rules, Strides q_strides, Strides k_strides, Strides v_strides,
                                Strides o_strides, BiasStrides bias_strides, Constants<kSlopes> slopes) {
  using Tile = ExactAttentionTile<kHead, kWarps>;
  constexpr int kStride = Tile::kStride, kTiles = Tile::kKeys / 8, kThreads = Tile::kThreads;
  float* q_shared = reinterpret_cast<float*>(dynamic_shared());
  float* k_shared = q_shared + Tile::kQueries * kStride;
  float* v_shared = k_shared + Tile::kKeys * kStride;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
  int batch = blockIdx.y / rules.heads, head = blockIdx.y % rules.heads;
  int key_head = head / (rules.heads / rules.key_heads), first = (gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  q += batch * q_strides.batch + head * q_strides.head;
  k += batch * k_strides.batch + key_head * k_strides.head;
  v += batch * v_strides.batch + key_head * v_strides.head;
  if (bias) bias += batch * bias_strides.batch + head * bias_strides.head;
  AttentionRange range = attention_range(rules, offset, first, Tile::kQueries);
  if (range.start < range.end) {
    exact_load<kHead, kThreads>(k_shared, k, k_strides.token, range.start * Tile::kKeys, rules.keys);
    exact_load<kHead, kThreads>(v_shared, v, v_strides.token, range.start * Tile::kKeys, rules.keys);
  }
  for (int i = threadIdx.x; i < Tile::kQueries * kHead; i += kThreads) {
    int row = i / kHead, column = i % kHead, query = min(first + row, rules.queries - 1);
    q_shared[row * kStride + column] = q[query * q_strides.token + column] * rules.scale;
  }
  float sums[kHead / 8][4] = {};
  Softmax state;
  int row = first + 16 * warp + group, mine = range.position + 16 * warp;
  bool plain = !bias && kSlopes == 1 && slopes.of[0] == 0.0f;
  const float* queries = q_shared + (16 * warp + group) * kStride + pair;
  for (int block = range.start; block < range.end; ++block) {
    int key = block * Tile::kKeys, next = key + Tile::kKeys;
    bool more = block + 1 < range.end;
    copy_wait<1>();  // the values may still be under way
    __syncthreads();
    float scores[kTiles][4] = {};
#pragma unroll 2
    for (int s = 0; s < kHead; s += 8) {
      Split<4> left({queries[s], queries[8 * kStride + s], queries[s + 4], queries[8 * kStride + s + 4]});
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float* keys = k_shared + (8 * j + group) * kStride + s + pair;
        multiply_split(scores[j], left, Split<2>({keys[0], keys[4]}));
      }
    }
    __syncthreads();
    if (more)
      exact_load<kHead, kThreads>(k_shared, k, k_strides.token, next, rules.keys);
    else
      copy_commit();
    if (plain && attention_is_full(rules, mine, key))
      attention_mask(scores, kLog2E, key, rules.keys, rules.keys, true);
    else
      attention_finish(scores, rules, row, mine + group, key + 2 * pair, slopes.of[kSlopes == 1 ? 0 : head], bias,
                       bias_strides);
    float factors[2];
    attention_weigh(state, scores, factors);
    attention_rescale(sums, factors);
    copy_wait<1>();  // the next keys may still be under way
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      Split<4> left({scores[i][0], scores[i][2], scores[i][1], scores[i][3]});
      const float* values = v_shared + (8 * i + 2 * pair) * kStride + group;
#pragma unroll
      for (int j = 0; j < kHead / 8; ++j)
        multiply_split(sums[j], left, Split<2>({values[8 * j], values[kStride + 8 * j]}));
    }
    __syncthreads();
    if (more)
      exact_load<kHead, kThreads>(v_shared, v, v_strides.token, next, rules.keys);
    else
      copy_commit();
  }
  o += batch * o_strides.batch + head * o_strides.head;
  attention_store<Bf16>(o, o_strides.token, sums, state, row, rules.queries, lane);
}

}  // namespace nas

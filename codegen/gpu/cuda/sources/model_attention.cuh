// Attention as models hand it over: q, k and v in float32, rounded to 16 bits on the way to the tensor cores.
//
// A block of `kWarps` warps takes 16 queries of one head a warp. Keys and values come in tiles of 64: each thread copies
// its own pieces in the background, rounds them where the last tile lay, and starts on the next before it computes.
// Scores may get a bias, fall with distance, and be hidden by causality or a window. Runs from sm_80 on.
#pragma once
#include "attention.cuh"

namespace nas {

// What the scores go through; known when the entry is compiled.
struct AttentionRules {
  int queries, keys, heads, key_heads;
  float scale;  // of the queries, before they are rounded
  bool causal;
  int window;  // keys at this distance or farther are hidden; 0: none are
};

// Elements between neighbours of the bias along an axis; 0 where all have the same.
struct BiasStrides {
  int64_t batch, head, query, key;
};

template <int kHead, int kWarps>
struct ModelAttentionTile {
  static constexpr int kQueries = 16 * kWarps, kKeys = 64, kThreads = 32 * kWarps;
  static constexpr int kStride = kHead + 8, kTileElements = kKeys * kStride;
  static constexpr int kSharedBytes = 2 * kTileElements * 2 + 2 * kKeys * kHead * 4;
};

// Eight neighbours, each times a factor, in 16 bits.
template <typename Type>
__device__ inline void round_eight(uint16_t* to, const float* from, float factor) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  words[0] = Type::pack(low.x * factor, low.y * factor);
  words[1] = Type::pack(low.z * factor, low.w * factor);
  words[2] = Type::pack(high.x * factor, high.y * factor);
  words[3] = Type::pack(high.z * factor, high.w * factor);
}

// Starts copying 64 rows of one head as they are; zeros beyond `tokens`.
template <int kHead, int kThreads>
__device__ inline void attention_stage(float* to, const float* from, int64_t token_stride, int first, int tokens) {
  for (int chunk = threadIdx.x; chunk < 64 * (kHead / 8); chunk += kThreads) {
    int row = chunk / (kHead / 8), column = chunk % (kHead / 8) * 8;
    bool valid = first + row < tokens;
    const float* source = valid ? from + (first + row) * token_stride + column : from;
    copy_async(to + row * kHead + column, source, valid);
    copy_async(to + row * kHead + column + 4, source + 4, valid);
  }
}

// Rounds what the same thread has copied.
template <typename Type, int kHead, int kThreads>
__device__ inline void attention_round(uint16_t* to, const float* from) {
  for (int chunk = threadIdx.x; chunk < 64 * (kHead / 8); chunk += kThreads) {
    int row = chunk / (kHead / 8), column = chunk % (kHead / 8) * 8;
    round_eight<Type>(to + row * (kHead + 8) + column, from + row * kHead + column, 1.0f);
  }
}

// The score of one pair in units of log2, or -infinity where the key is hidden.
__device__ inline float attention_score(float product, const AttentionRules& rules, int distance, bool exists,
                                        float slope, const float* bias) {
  bool seen = exists && (!rules.causal || distance >= 0) && (!rules.window || abs(distance) < rules.window);
  float score = product - slope * abs(distance);
  if (bias && seen) score += *bias;
  return seen ? score * kLog2E : -INFINITY;
}

// Finishes the scores of a lane's two rows, eight apart, the first at `row` and at place `position` among the keys.
template <int kTiles>
__device__ inline void attention_finish(float (&scores)[kTiles][4], const AttentionRules& rules, int row, int position,
                                        int key, float slope, const float* bias, BiasStrides strides) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int place = key + 8 * j + i % 2, query = row + i / 2 * 8;
      const float* at = bias ? bias + query * strides.query + place * strides.key : nullptr;
      scores[j][i] = attention_score(scores[j][i], rules, position + i / 2 * 8 - place,
                                     place < rules.keys && query < rules.queries, slope, at);
    }
}

// Where a block's first query stands among the keys, and the tiles of 64 keys that its queries may see.
struct AttentionRange {
  int position, start, end;
};
__device__ inline AttentionRange attention_range(const AttentionRules& rules, const int* offset, int first, int count) {
  int position = first + (offset ? *offset : rules.keys - rules.queries), start = 0;
  int end = rules.causal ? min(rules.keys, position + count) : rules.keys;
  if (rules.window) {
    start = max(position - rules.window + 1, 0) / 64;
    end = min(end, position + count - 1 + rules.window);
  }
  return {position, start, (end + 63) / 64};
}

// Whether 16 queries from `position` on see all of 64 keys from `key` on.
__device__ inline bool attention_is_full(const AttentionRules& rules, int position, int key) {
  int last = key + 63;
  return last < rules.keys && (!rules.causal || last <= position) &&
         (!rules.window || (position + 15 - key < rules.window && last - position < rules.window));
}

// Grid: blocks of queries, heads times batch. `offset`, if given, is where the first query stands among the keys.
template <typename Type, int kHead, int kWarps, typename Out, int kSlopes>
__device__ void model_attention(const float* q, const float* k, const float* v, const int* offset, const float* bias,
                                Out* o, AttentionRules rules, Strides q_strides, Strides k_strides, Strides v_strides,
                                Strides o_strides, BiasStrides bias_strides, Constants<kSlopes> slopes) {
  using Tile = ModelAttentionTile<kHead, kWarps>;
  constexpr int kSteps = kHead / 16, kTiles = Tile::kKeys / 8, kThreads = Tile::kThreads;
  uint16_t* tiles = reinterpret_cast<uint16_t*>(dynamic_shared());
  float* staged = reinterpret_cast<float*>(tiles + 2 * Tile::kTileElements);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int batch = blockIdx.y / rules.heads, head = blockIdx.y % rules.heads;
  int key_head = head / (rules.heads / rules.key_heads), first = (gridDim.x - 1 - blockIdx.x) * Tile::kQueries;
  q += batch * q_strides.batch + head * q_strides.head;
  k += batch * k_strides.batch + key_head * k_strides.head;
  v += batch * v_strides.batch + key_head * v_strides.head;
  if (bias) bias += batch * bias_strides.batch + head * bias_strides.head;
  AttentionRange range = attention_range(rules, offset, first, Tile::kQueries);
  int start = range.start, blocks = range.end;
  auto load = [&](int block) {
    if (block >= blocks) return;
    attention_stage<kHead, kThreads>(staged, k, k_strides.token, block * Tile::kKeys, rules.keys);
    attention_stage<kHead, kThreads>(staged + Tile::kKeys * kHead, v, v_strides.token, block * Tile::kKeys, rules.keys);
    copy_commit();
  };
  load(start);
  for (int chunk = threadIdx.x; chunk < Tile::kQueries * (kHead / 8); chunk += kThreads) {
    int row = chunk / (kHead / 8), column = chunk % (kHead / 8) * 8, query = min(first + row, rules.queries - 1);
    round_eight<Type>(tiles + row * Tile::kStride + column, q + query * q_strides.token + column, rules.scale);
  }
  __syncthreads();
  uint32_t query[kSteps][4];
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    load_matrices(query[s], tiles + (16 * warp + lane % 16) * Tile::kStride + 16 * s + lane / 16 * 8);
  float sums[kHead / 8][4] = {};
  Softmax state;
  int row = first + 16 * warp + lane / 4, mine = range.position + 16 * warp;
  bool plain = !bias && kSlopes == 1 && slopes.of[0] == 0.0f;
  for (int block = start; block < blocks; ++block) {
    int key = block * Tile::kKeys;
    copy_wait<0>();
    __syncthreads();  // all have read what lay here
    attention_round<Type, kHead, kThreads>(tiles, staged);
    attention_round<Type, kHead, kThreads>(tiles + Tile::kTileElements, staged + Tile::kKeys * kHead);
    load(block + 1);
    __syncthreads();
    float scores[kTiles][4] = {};
    attention_scores<Type, kHead>(scores, query, tiles, lane);
    if (plain && attention_is_full(rules, mine, key))
      attention_mask(scores, kLog2E, key, rules.keys, rules.keys, true);
    else
      attention_finish(scores, rules, row, mine + lane / 4, key + lane % 4 * 2, slopes.of[kSlopes == 1 ? 0 : head],
                       bias, bias_strides);
    float factors[2];
    attention_weigh(state, scores, factors);
    attention_rescale(sums, factors);
    attention_mix<Type, kHead>(sums, scores, tiles + Tile::kTileElements, lane);
  }
  o += batch * o_strides.batch + head * o_strides.head;
  attention_store<Type>(o, o_strides.token, sums, state, row, rules.queries, lane);
}

}  // namespace nas

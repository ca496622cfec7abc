// Attention of few queries to many keys, as in decoding: the keys are shared out to blocks, then the shares are joined.
//
// Everything is float32; the time is that of reading the keys and values once. A block takes one head of keys and up to
// `kRows` of the queries that read it (of the heads that share it, and of neighbouring tokens). Groups of `kLanes` lanes
// take a key each and keep a softmax of their own as a running maximum and sum. Runs from sm_80 on.
#pragma once
#include "model_attention.cuh"

namespace nas {

// `kVectors` times four features a lane.
template <int kHead, int kLanes, int kRows>
struct DecodeTile {
  static constexpr int kThreads = 128, kGroups = kThreads / kLanes, kVectors = kHead / (4 * kLanes);
  static constexpr int kUnrolled = kVectors == 1 ? 4 : 2;  // keys whose reading overlaps
  static constexpr int kSharedBytes = kGroups * kRows * (kHead + 2) * 4;
};

template <int kVectors>
struct DecodePiece {
  float4 at[kVectors];
};

template <int kVectors, int kLanes>
__device__ inline DecodePiece<kVectors> decode_load(const float* from, int lane) {
  DecodePiece<kVectors> found;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) found.at[i] = *reinterpret_cast<const float4*>(from + 4 * (i * kLanes + lane));
  return found;
}

template <int kVectors>
__device__ inline float decode_product(const DecodePiece<kVectors>& a, const DecodePiece<kVectors>& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    sum += a.at[i].x * b.at[i].x + a.at[i].y * b.at[i].y + a.at[i].z * b.at[i].z + a.at[i].w * b.at[i].w;
  return sum;
}

// a = a * keep + b * add
template <int kVectors>
__device__ inline void decode_add(DecodePiece<kVectors>& a, float keep, const DecodePiece<kVectors>& b, float add) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    a.at[i].x = a.at[i].x * keep + b.at[i].x * add;
    a.at[i].y = a.at[i].y * keep + b.at[i].y * add;
    a.at[i].z = a.at[i].z * keep + b.at[i].z * add;
    a.at[i].w = a.at[i].w * keep + b.at[i].w * add;
  }
}

// Joins `count` shares of a row, of which share i has its maximum, sum and mixed values at `share(i)`; one feature.
template <typename Share>
__device__ inline float decode_join(int count, int feature, Share share, float& top, float& total) {
  float sum = 0.0f;
  top = -1e30f;
  total = 0.0f;
  for (int i = 0; i < count; ++i) top = fmaxf(top, share(i)[0]);
  for (int i = 0; i < count; ++i) {
    float factor = exp2_fast(share(i)[0] - top);
    total += share(i)[1] * factor;
    sum += share(i)[2 + feature] * factor;
  }
  return sum;
}

// Where the rows of a head of keys are: `row` counts tokens within heads.
struct DecodeRow {
  int query, head;
  bool exists;
};
__device__ inline DecodeRow decode_row(const AttentionRules& rules, int key_head, int row) {
  int group = rules.heads / rules.key_heads, count = group * rules.queries, at = min(row, count - 1);
  return {at % rules.queries, key_head * group + at / rules.queries, row < count};
}

// Grid: shares of the keys, parts of `kRows` rows within heads of keys within batch. With one share, `parts` is unused
// and o is written; with more, `parts` gets the maximum, the sum and the mixed values of each share:
// [batch, token, head, share, 2 + kHead].
template <int kHead, int kLanes, int kRows, typename Out, int kSlopes>
__device__ void decode_attention(const float* q, const float* k, const float* v, const int* offset, const float* bias,
                                 float* parts, Out* o, AttentionRules rules, Strides q_strides, Strides k_strides,
                                 Strides v_strides, BiasStrides bias_strides, Constants<kSlopes> slopes) {
  using Tile = DecodeTile<kHead, kLanes, kRows>;
  using Piece = DecodePiece<Tile::kVectors>;
  constexpr int kUnrolled = Tile::kUnrolled, kShare = kHead + 2;
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, shares = gridDim.x;
  int row_parts = (rules.heads / rules.key_heads * rules.queries + kRows - 1) / kRows;
  int first_row = blockIdx.y % row_parts * kRows, key_head = blockIdx.y / row_parts % rules.key_heads;
  int batch = blockIdx.y / (row_parts * rules.key_heads), from = offset ? *offset : rules.keys - rules.queries;
  int low = rules.window ? max(from - rules.window + 1, 0) : 0;
  int high = rules.causal ? min(rules.keys, from + rules.queries) : rules.keys;
  if (rules.window) high = min(high, from + rules.queries - 1 + rules.window);
  int share = (max(high - low, 0) + shares - 1) / shares, start = low + blockIdx.x * share, end = min(start + share, high);
  k += batch * k_strides.batch + key_head * k_strides.head;
  v += batch * v_strides.batch + key_head * v_strides.head;
  if (bias) bias += batch * bias_strides.batch;
  Piece queries[kRows], sums[kRows] = {};
  float tops[kRows], totals[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    DecodeRow row = decode_row(rules, key_head, first_row + r);
    Piece mine = decode_load<Tile::kVectors, kLanes>(
        q + batch * q_strides.batch + row.query * q_strides.token + row.head * q_strides.head, lane);
    queries[r] = {};
    decode_add(queries[r], 0.0f, mine, rules.scale);
    tops[r] = -1e30f;
  }
  // All lanes of a warp take as many turns: their groups exchange sums.
  for (int turn = start; turn < end; turn += Tile::kGroups * kUnrolled) {
    Piece keys[kUnrolled], values[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      int64_t key = min(turn + u * Tile::kGroups + group, end - 1);
      keys[u] = decode_load<Tile::kVectors, kLanes>(k + key * k_strides.token, lane);
      values[u] = decode_load<Tile::kVectors, kLanes>(v + key * v_strides.token, lane);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      int key = turn + u * Tile::kGroups + group;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        DecodeRow row = decode_row(rules, key_head, first_row + r);
        float product = decode_product(queries[r], keys[u]);
#pragma unroll
        for (int distance = kLanes / 2; distance; distance /= 2)
          product += __shfl_xor_sync(0xffffffffu, product, distance);
        const float* at = bias ? bias + row.head * bias_strides.head + row.query * bias_strides.query +
                                     key * bias_strides.key
                               : nullptr;
        float score = attention_score(product, rules, from + row.query - key, key < end,
                                      slopes.of[kSlopes == 1 ? 0 : row.head], at);
        float top = fmaxf(tops[r], score), keep = exp2_fast(tops[r] - top), weight = exp2_fast(score - top);
        tops[r] = top;
        totals[r] = totals[r] * keep + weight;
        decode_add(sums[r], keep, values[u], weight);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float* mine = shared + (group * kRows + r) * kShare;
    if (lane == 0) {
      mine[0] = tops[r];
      mine[1] = totals[r];
    }
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      float* to = mine + 2 + 4 * (i * kLanes + lane);
      to[0] = sums[r].at[i].x;
      to[1] = sums[r].at[i].y;
      to[2] = sums[r].at[i].z;
      to[3] = sums[r].at[i].w;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kHead; i += Tile::kThreads) {
    int r = i / kHead, feature = i % kHead;
    DecodeRow row = decode_row(rules, key_head, first_row + r);
    if (!row.exists) continue;
    float top, total;
    float sum = decode_join(
        Tile::kGroups, feature, [&](int g) { return shared + (g * kRows + r) * kShare; }, top, total);
    int64_t place = (int64_t(batch) * rules.queries + row.query) * rules.heads + row.head;
    if (shares == 1) {
      store_element<Bf16>(o + place * kHead + feature, total > 0.0f ? sum / total : 0.0f);
      continue;
    }
    float* to = parts + (place * shares + blockIdx.x) * kShare;
    to[2 + feature] = sum;
    if (feature == 0) {
      to[0] = top;
      to[1] = total;
    }
  }
}

// Grid: rows of o. Joins the shares of each.
template <int kHead, typename Out>
__device__ void decode_join_shares(const float* parts, Out* o, int shares) {
  constexpr int kShare = kHead + 2;
  const float* mine = parts + int64_t(blockIdx.x) * shares * kShare;
  for (int feature = threadIdx.x; feature < kHead; feature += 128) {
    float top, total;
    float sum = decode_join(shares, feature, [&](int i) { return mine + i * kShare; }, top, total);
    store_element<Bf16>(o + int64_t(blockIdx.x) * kHead + feature, total > 0.0f ? sum / total : 0.0f);
  }
}

}  // namespace nas

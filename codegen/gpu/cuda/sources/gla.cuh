// Gated linear attention, S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t and o_t = scale q_t S_t, by chunks of 64 tokens.
//
// `g` is the logarithm of the decay, at most 0, of each key channel, of a head (a stride of 0 along the features: scalar
// gates as in Mamba-2), or fixed (0 along the tokens too: retention). With b the sums of g inside a chunk,
//   o = scale ((q exp(b)) S + A v),   A[i, j] = sum_d q[i, d] k[j, d] exp(b[i, d] - b[j, d]) for j <= i.
// exp(-b) alone overflows under strong decay, so A is made in sub-chunks of 16 tokens: between two of them both factors
// are taken relative to the start of the later one, where no exponent is positive; inside one the exponent is formed
// before it is raised. Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, 2024.
//
// `gla_states` writes the state before each chunk, `gla_outputs` then serves all chunks at once. From sm_80 on.
#pragma once
#include "attention.cuh"

namespace nas {

struct GlaTile {
  static constexpr int kChunk = 64, kBlock = 64, kThreads = 128;
  static constexpr int kStride = kBlock + 8;
  static constexpr int kGateStride = kBlock + 4;
  static constexpr int kStatesBytes = 2 * kChunk * kStride * 2 + kChunk * kGateStride * 4;
};

template <int kKey, int kValue>
struct GlaOutputs {
  static constexpr int kStride = kKey + 8, kValueStride = kValue + 8, kGateStride = kKey + 4;
  static constexpr int kSharedBytes =
      (2 * GlaTile::kChunk * kStride + (GlaTile::kChunk + kKey) * kValueStride) * 2 + GlaTile::kChunk * kGateStride * 4;
};

// Writes the running sums of a chunk's gates, times log2(e), for `kWidth` features; tokens beyond the end add nothing.
template <int kWidth>
__device__ inline void gla_sum_gates(float* to, int stride, const float* g, GateStrides strides, int first, int tokens) {
  for (int i = threadIdx.x; i < GlaTile::kChunk * kWidth; i += GlaTile::kThreads) {
    int token = i / kWidth, feature = i % kWidth;
    bool valid = first + token < tokens;
    to[token * stride + feature] =
        valid ? g[(first + token) * strides.token + feature * strides.feature] * kLog2E : 0.0f;
  }
  __syncthreads();
  for (int feature = threadIdx.x; feature < kWidth; feature += GlaTile::kThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int token = 0; token < GlaTile::kChunk; ++token) {
      sum += to[token * stride + feature];
      to[token * stride + feature] = sum;
    }
  }
  __syncthreads();
}

// Starts copying a chunk's rows of `kWidth` features of one head.
template <int kWidth>
__device__ inline void gla_load(uint16_t* to, const uint16_t* from, int64_t token_stride, int first, int tokens) {
  for (int chunk = threadIdx.x; chunk < GlaTile::kChunk * (kWidth / 8); chunk += GlaTile::kThreads) {
    int row = chunk / (kWidth / 8), column = chunk % (kWidth / 8) * 8;
    bool valid = first + row < tokens;
    copy_async(to + row * (kWidth + 8) + column, valid ? from + (first + row) * token_stride + column : from, valid);
  }
}

// Grid: key blocks times value blocks, heads times batch. `states` is [batch, head, chunk, kKey, kValue].
template <typename Type, int kKey, int kValue>
__device__ void gla_states(const uint16_t* k, const uint16_t* v, const float* g, uint16_t* states, int tokens,
                           int heads, Strides k_strides, Strides v_strides, GateStrides g_strides) {
  constexpr int kStride = GlaTile::kStride, kGateStride = GlaTile::kGateStride, kBlock = GlaTile::kBlock;
  uint16_t* k_shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* v_shared = k_shared + GlaTile::kChunk * kStride;
  float* sums = reinterpret_cast<float*>(v_shared + GlaTile::kChunk * kStride);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
  int key_block = blockIdx.x / (kValue / kBlock) * kBlock, value_block = blockIdx.x % (kValue / kBlock) * kBlock;
  int batch = blockIdx.y / heads, head = blockIdx.y % heads, chunks = (tokens + GlaTile::kChunk - 1) / GlaTile::kChunk;
  k += batch * k_strides.batch + head * k_strides.head + key_block;
  v += batch * v_strides.batch + head * v_strides.head + value_block;
  g += batch * g_strides.batch + head * g_strides.head + key_block * g_strides.feature;
  states += (int64_t(blockIdx.y) * chunks * kKey + key_block) * kValue + value_block;
  float state[kBlock / 8][4] = {};
  int row = 16 * warp + group;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint16_t* out = states + int64_t(chunk) * kKey * kValue;
#pragma unroll
    for (int j = 0; j < kBlock / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(out + (row + 8 * half) * kValue + 8 * j + 2 * pair) =
            Type::pack(state[j][2 * half], state[j][2 * half + 1]);
    if (chunk + 1 == chunks) break;
    __syncthreads();
    gla_load<kBlock>(k_shared, k, k_strides.token, chunk * GlaTile::kChunk, tokens);
    gla_load<kBlock>(v_shared, v, v_strides.token, chunk * GlaTile::kChunk, tokens);
    copy_commit();
    gla_sum_gates<kBlock>(sums, kGateStride, g, g_strides, chunk * GlaTile::kChunk, tokens);
    copy_wait<0>();
    __syncthreads();
    float ends[2] = {sums[(GlaTile::kChunk - 1) * kGateStride + row],
                     sums[(GlaTile::kChunk - 1) * kGateStride + row + 8]};
#pragma unroll
    for (int j = 0; j < kBlock / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) state[j][i] *= exp2_fast(ends[i / 2]);
    auto decayed = [&](int token, int half) {
      float factor = exp2_fast(ends[half] - sums[token * kGateStride + row + 8 * half]);
      return Type::read(k_shared[token * kStride + row + 8 * half]) * factor;
    };
#pragma unroll
    for (int s = 0; s < GlaTile::kChunk / 16; ++s) {
      uint32_t keys[4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        int token = 16 * s + part / 2 * 8 + 2 * pair;
        keys[part] = Type::pack(decayed(token, part % 2), decayed(token + 1, part % 2));
      }
#pragma unroll
      for (int j = 0; j < kBlock / 8; j += 2) {
        uint32_t values[4];
        load_matrices_transposed(
            values, v_shared + (16 * s + lane / 8 % 2 * 8 + lane % 8) * kStride + 8 * j + lane / 16 * 8);
        multiply<Type>(state[j], keys, values[0], values[1]);
        multiply<Type>(state[j + 1], keys, values[2], values[3]);
      }
    }
  }
}

// Scores between the 16 tokens of a warp and those of an earlier sub-chunk, relative to the start of the later one.
template <typename Type, int kKey>
__device__ inline void gla_between(float (&scores)[2][4], const uint16_t* q, const uint16_t* k, const float* sums,
                                   int mine, int other, int group, int pair) {
  constexpr int kStride = kKey + 8, kGateStride = kKey + 4;
#pragma unroll
  for (int s = 0; s < kKey / 16; ++s) {
    uint32_t queries[4], keys[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      float rows[2], columns[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int row = mine + part % 2 * 8 + group, d = 16 * s + part / 2 * 8 + 2 * pair + i;
        int column = other + part / 2 * 8 + group, e = 16 * s + part % 2 * 8 + 2 * pair + i;
        rows[i] = Type::read(q[row * kStride + d]) *
                  exp2_fast(sums[row * kGateStride + d] - sums[mine * kGateStride + d]);
        columns[i] = Type::read(k[column * kStride + e]) *
                     exp2_fast(sums[mine * kGateStride + e] - sums[column * kGateStride + e]);
      }
      queries[part] = Type::pack(rows[0], rows[1]);
      keys[part] = Type::pack(columns[0], columns[1]);
    }
    multiply<Type>(scores[0], queries, keys[0], keys[1]);
    multiply<Type>(scores[1], queries, keys[2], keys[3]);
  }
}

// Scores among the 16 tokens of a warp, each pair by itself in float32; zero above the diagonal.
template <typename Type, int kKey>
__device__ inline void gla_within(float (&scores)[2][4], const uint16_t* q, const uint16_t* k, const float* sums,
                                  int mine, int group, int pair) {
  constexpr int kStride = kKey + 8, kGateStride = kKey + 4;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = mine + i / 2 * 8 + group, column = mine + 8 * j + 2 * pair + i % 2;
      float score = 0.0f;
      if (column <= row)
        for (int d = 0; d < kKey; ++d)
          score += Type::read(q[row * kStride + d]) * Type::read(k[column * kStride + d]) *
                   exp2_fast(sums[row * kGateStride + d] - sums[column * kGateStride + d]);
      scores[j][i] = score;
    }
}

// Grid: chunks, heads times batch; the four warps of a block take 16 tokens each.
template <typename Type, int kKey, int kValue>
__device__ void gla_outputs(const uint16_t* q, const uint16_t* k, const uint16_t* v, const float* g,
                            const uint16_t* states, uint16_t* o, int tokens, int heads, float scale, Strides q_strides,
                            Strides k_strides, Strides v_strides, GateStrides g_strides, Strides o_strides) {
  using Tile = GlaOutputs<kKey, kValue>;
  constexpr int kStride = Tile::kStride, kValueStride = Tile::kValueStride, kGateStride = Tile::kGateStride;
  uint16_t* q_shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* k_shared = q_shared + GlaTile::kChunk * kStride;
  uint16_t* v_shared = k_shared + GlaTile::kChunk * kStride;
  uint16_t* s_shared = v_shared + GlaTile::kChunk * kValueStride;
  float* sums = reinterpret_cast<float*>(s_shared + kKey * kValueStride);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
  int batch = blockIdx.y / heads, head = blockIdx.y % heads, first = blockIdx.x * GlaTile::kChunk;
  gla_load<kKey>(q_shared, q + batch * q_strides.batch + head * q_strides.head, q_strides.token, first, tokens);
  gla_load<kKey>(k_shared, k + batch * k_strides.batch + head * k_strides.head, k_strides.token, first, tokens);
  gla_load<kValue>(v_shared, v + batch * v_strides.batch + head * v_strides.head, v_strides.token, first, tokens);
  states += (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * kKey * kValue;
  for (int i = threadIdx.x; i < kKey * kValue / 8; i += GlaTile::kThreads)
    copy_async(s_shared + i / (kValue / 8) * kValueStride + i % (kValue / 8) * 8, states + 8 * i, true);
  copy_commit();
  gla_sum_gates<kKey>(sums, kGateStride, g + batch * g_strides.batch + head * g_strides.head, g_strides, first, tokens);
  copy_wait<0>();
  __syncthreads();
  int mine = 16 * warp;
  float outputs[kValue / 8][4] = {};
#pragma unroll
  for (int s = 0; s < kKey / 16; ++s) {
    uint32_t queries[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      int row = mine + part % 2 * 8 + group, d = 16 * s + part / 2 * 8 + 2 * pair;
      auto decayed = [&](int e) {
        return Type::read(q_shared[row * kStride + e]) * exp2_fast(sums[row * kGateStride + e]);
      };
      queries[part] = Type::pack(decayed(d), decayed(d + 1));
    }
#pragma unroll
    for (int j = 0; j < kValue / 8; j += 2) {
      uint32_t rows[4];
      load_matrices_transposed(
          rows, s_shared + (16 * s + lane / 8 % 2 * 8 + lane % 8) * kValueStride + 8 * j + lane / 16 * 8);
      multiply<Type>(outputs[j], queries, rows[0], rows[1]);
      multiply<Type>(outputs[j + 1], queries, rows[2], rows[3]);
    }
  }
  for (int other = 0; other <= mine; other += 16) {
    float scores[2][4] = {};
    if (other < mine)
      gla_between<Type, kKey>(scores, q_shared, k_shared, sums, mine, other, group, pair);
    else
      gla_within<Type, kKey>(scores, q_shared, k_shared, sums, mine, group, pair);
    uint32_t weights[4] = {Type::pack(scores[0][0], scores[0][1]), Type::pack(scores[0][2], scores[0][3]),
                           Type::pack(scores[1][0], scores[1][1]), Type::pack(scores[1][2], scores[1][3])};
#pragma unroll
    for (int j = 0; j < kValue / 8; j += 2) {
      uint32_t values[4];
      load_matrices_transposed(
          values, v_shared + (other + lane / 8 % 2 * 8 + lane % 8) * kValueStride + 8 * j + lane / 16 * 8);
      multiply<Type>(outputs[j], weights, values[0], values[1]);
      multiply<Type>(outputs[j + 1], weights, values[2], values[3]);
    }
  }
  o += batch * o_strides.batch + head * o_strides.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = first + mine + 8 * half + group;
    if (row < tokens)
#pragma unroll
      for (int j = 0; j < kValue / 8; ++j)
        *reinterpret_cast<uint32_t*>(o + row * o_strides.token + 8 * j + 2 * pair) =
            Type::pack(outputs[j][2 * half] * scale, outputs[j][2 * half + 1] * scale);
  }
}

}  // namespace nas

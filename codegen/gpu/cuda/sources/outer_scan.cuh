// S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale q_t^T S_t by chunks of 64 tokens, all in float32.
//
// Products run on tensor cores as three of numbers of 11 bits, which keeps what float32 holds. `scan_states` makes what
// each chunk adds to the state, `scan_join` the states before the chunks, `scan_outputs` serves all chunks at once:
//   o = scale ((q exp(b)) S + A v),   A[i, j] = sum_d q[i, d] k[j, d] exp(b[i, d] - b[j, d]) for j <= i,
// b the sums of g. Sums are kept for parts of 16 tokens, so that no exponent is positive and none is lost in a large
// sum; inside a part decays of single features are raised pair by pair. Source: Yang et al., Gated Linear Attention
// Transformers with Hardware-Efficient Training, 2024. Runs from sm_80 on.
#pragma once
#include "attention.cuh"

namespace nas {

enum Decay { kNoDecay, kHeadDecay, kKeyDecay };

constexpr int kScanChunk = 64, kScanPart = 16, kScanParts = kScanChunk / kScanPart, kScanThreads = 128;
constexpr float kNothing = -150.0f;  // 2^-150 is zero in float32

struct ScanShape {
  int tokens, heads, chunks;
  float scale;
};

// Sums of the decays of a chunk in units of log2, within parts, and those of all parts before.
template <int kKey, int kDecay>
struct ScanGates {
  static constexpr int kFeatures = kDecay == kKeyDecay ? kKey : 1;
  static constexpr int kStride = kDecay == kKeyDecay ? kKey + 4 : 1;
  static constexpr int kElements = kDecay == kNoDecay ? 0 : kScanChunk * kStride + (kScanParts + 1) * kFeatures;
  float* sums;

  __device__ float& within(int token, int d) const { return sums[token * kStride + d % kFeatures]; }
  __device__ float& before(int part, int d) const {
    return sums[kScanChunk * kStride + part * kFeatures + d % kFeatures];
  }
  // Exponents of what is left: from the start of the chunk or of the token's part, after a token until a part starts.
  __device__ float since_start(int token, int d) const {
    return kDecay == kNoDecay ? 0.0f : within(token, d) + before(token / kScanPart, d);
  }
  __device__ float since_part(int token, int d) const { return kDecay == kNoDecay ? 0.0f : within(token, d); }
  __device__ float until(int token, int part, int d) const {
    int mine = token / kScanPart;
    return kDecay == kNoDecay ? 0.0f
                              : within(mine * kScanPart + kScanPart - 1, d) - within(token, d) + before(part, d) -
                                    before(mine + 1, d);
  }
  __device__ static float raise(float exponent) { return kDecay == kNoDecay ? 1.0f : exp2_fast(exponent); }

  // Everybody of the block comes here; without `g` every token has `rate`. Tokens beyond the end keep all.
  __device__ void fill(const float* g, GateStrides strides, float rate, int first, int tokens) const {
    if (kDecay == kNoDecay) return;
    for (int i = threadIdx.x; i < kScanParts * kFeatures; i += kScanThreads) {
      int part = i / kFeatures, d = i % kFeatures;
      float sum = 0.0f;
#pragma unroll
      for (int t = 0; t < kScanPart; ++t) {
        int token = first + part * kScanPart + t;
        if (token < tokens) {
          float step = g ? g[token * strides.token + d * strides.feature] : rate;
          sum += fmaxf(step * kLog2E, kNothing);
        }
        within(part * kScanPart + t, d) = sum;
      }
      before(part + 1, d) = sum;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < kFeatures; d += kScanThreads) {
      float sum = 0.0f;
      before(0, d) = 0.0f;
      for (int part = 1; part <= kScanParts; ++part) before(part, d) = sum += before(part, d);
    }
    __syncthreads();
  }
};

// Starts copying a chunk's rows of `kWidth` features; zeros beyond the end.
template <int kWidth>
__device__ inline void scan_load(float* to, const float* from, int64_t token_stride, int first, int tokens) {
  for (int chunk = threadIdx.x; chunk < kScanChunk * (kWidth / 4); chunk += kScanThreads) {
    int row = chunk / (kWidth / 4), column = chunk % (kWidth / 4) * 4;
    bool valid = first + row < tokens;
    copy_async(to + row * (kWidth + 4) + column, valid ? from + (first + row) * token_stride + column : from, valid);
  }
}

// Where a block is: chunk and first column of the values, batch and head.
struct ScanPlace {
  int chunk, column, batch, head;
};
template <int kValue, int kTile>
__device__ inline ScanPlace scan_place(int heads) {
  constexpr int kTiles = kValue / kTile;
  return {int(blockIdx.x) / kTiles, int(blockIdx.x) % kTiles * kTile, int(blockIdx.y) / heads, int(blockIdx.y) % heads};
}

// Grid: chunks times tiles of values, heads times batch. `work` gets what each chunk adds, [batch, head, chunk, kKey,
// kValue], and behind that what it keeps of the state, [batch, head, chunk, kKey].
template <int kKey, int kValue, int kTile, int kDecay, int kRates>
__device__ void scan_states(const float* k, const float* v, const float* g, float* work, ScanShape shape,
                            Strides k_strides, Strides v_strides, GateStrides g_strides, Constants<kRates> rates) {
  constexpr int kStride = kKey + 4, kValueStride = kTile + 4;
  float* k_shared = reinterpret_cast<float*>(dynamic_shared());
  float* v_shared = k_shared + kScanChunk * kStride;
  ScanGates<kKey, kDecay> gates{v_shared + kScanChunk * kValueStride};
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
  ScanPlace at = scan_place<kValue, kTile>(shape.heads);
  int first = at.chunk * kScanChunk;
  k += at.batch * k_strides.batch + at.head * k_strides.head;
  v += at.batch * v_strides.batch + at.head * v_strides.head + at.column;
  if (g) g += at.batch * g_strides.batch + at.head * g_strides.head;
  scan_load<kKey>(k_shared, k, k_strides.token, first, shape.tokens);
  scan_load<kTile>(v_shared, v, v_strides.token, first, shape.tokens);
  copy_commit();
  gates.fill(g, g_strides, rates.of[kRates == 1 ? 0 : at.head], first, shape.tokens);
  copy_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; kDecay != kNoDecay && i < kScanChunk * kKey; i += kScanThreads) {
    int token = i / kKey, d = i % kKey;
    k_shared[token * kStride + d] *= exp2_fast(gates.until(token, kScanParts, d));
  }
  __syncthreads();
  int64_t place = int64_t(blockIdx.y) * shape.chunks + at.chunk;
  float* kept = work + int64_t(gridDim.y) * shape.chunks * kKey * kValue + place * kKey;
  for (int d = threadIdx.x; at.column == 0 && d < kKey; d += kScanThreads)
    kept[d] = kDecay == kNoDecay ? 1.0f : exp2_fast(gates.before(kScanParts, d));
  for (int row = 16 * warp; row < kKey; row += 16 * (kScanThreads / 32)) {
    float sums[kTile / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kScanChunk; s += 8) {
      const float* keys = k_shared + (s + 2 * pair) * kStride + row + group;
      const float* values = v_shared + (s + 2 * pair) * kValueStride + group;
      Split<4> left({keys[0], keys[8], keys[kStride], keys[kStride + 8]});
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j)
        multiply_split(sums[j], left, Split<2>({values[8 * j], values[kValueStride + 8 * j]}));
    }
    float* to = work + (place * kKey + row + group) * kValue + at.column + 2 * pair;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(to + 8 * half * kValue + 8 * j) = {sums[j][2 * half], sums[j][2 * half + 1]};
  }
}

// Grid: quarters of the elements of a state by blocks of threads, heads times batch. Puts the state before each chunk in
// the place of what the chunk adds; `initial` and `last` may be null.
template <int kKey, int kValue>
__device__ void scan_join(float* work, const float* initial, float* last, int chunks) {
  constexpr int kState = kKey * kValue, kAhead = 4;
  int element = 4 * (blockIdx.x * kScanThreads + threadIdx.x);
  if (element >= kState) return;
  const float* kept = work + int64_t(gridDim.y) * chunks * kState + int64_t(blockIdx.y) * chunks * kKey +
                      element / kValue;
  float4* states = reinterpret_cast<float4*>(work + int64_t(blockIdx.y) * chunks * kState + element);
  int64_t place = int64_t(blockIdx.y) * kState + element;
  float4 state = {0.0f, 0.0f, 0.0f, 0.0f};
  if (initial) state = *reinterpret_cast<const float4*>(initial + place);
  for (int chunk = 0; chunk < chunks; chunk += kAhead) {
    float4 added[kAhead];
    float factors[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      int here = min(chunk + i, chunks - 1);
      added[i] = states[int64_t(here) * (kState / 4)];
      factors[i] = kept[here * kKey];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (chunk + i >= chunks) break;
      states[int64_t(chunk + i) * (kState / 4)] = state;
      state.x = state.x * factors[i] + added[i].x;
      state.y = state.y * factors[i] + added[i].y;
      state.z = state.z * factors[i] + added[i].z;
      state.w = state.w * factors[i] + added[i].w;
    }
  }
  if (last) *reinterpret_cast<float4*>(last + place) = state;
}

// Adds the products of the 16 queries from `mine` on and the 16 keys from `other` on, each times its decay relative to
// the start of the part of the queries.
template <int kKey, int kDecay>
__device__ inline void scan_scores(float (&scores)[2][4], const float* q, const float* k,
                                   ScanGates<kKey, kDecay> gates, int mine, int other, int group, int pair) {
  constexpr int kStride = kKey + 4;
  auto query = [&](int row, int d) {
    float factor = kDecay == kKeyDecay ? exp2_fast(gates.since_part(row, d)) : 1.0f;
    return q[row * kStride + d] * factor;
  };
  auto key = [&](int column, int d) {
    float factor = kDecay == kKeyDecay ? exp2_fast(gates.until(column, mine / kScanPart, d)) : 1.0f;
    return k[column * kStride + d] * factor;
  };
#pragma unroll 2
  for (int s = 0; s < kKey; s += 8) {
    int row = mine + group, d = s + pair;
    Split<4> left({query(row, d), query(row + 8, d), query(row, d + 4), query(row + 8, d + 4)});
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int column = other + 8 * j + group;
      multiply_split(scores[j], left, Split<2>({key(column, d), key(column, d + 4)}));
    }
  }
}

// Finishes the scores: decays of heads, pairs of one part with decays of features, and none above the diagonal.
template <int kKey, int kDecay>
__device__ inline void scan_finish(float (&scores)[2][4], const float* q, const float* k,
                                   ScanGates<kKey, kDecay> gates, int mine, int other, int group, int pair) {
  constexpr int kStride = kKey + 4;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = mine + i / 2 * 8 + group, column = other + 8 * j + 2 * pair + i % 2;
      if (column > row) {
        scores[j][i] = 0.0f;
      } else if (kDecay == kHeadDecay) {
        scores[j][i] *= exp2_fast(other < mine ? gates.since_part(row, 0) + gates.until(column, mine / kScanPart, 0)
                                               : gates.within(row, 0) - gates.within(column, 0));
      } else if (kDecay == kKeyDecay && other == mine) {
        float score = 0.0f;
        for (int d = 0; d < kKey; ++d)
          score += q[row * kStride + d] * k[column * kStride + d] *
                   exp2_fast(gates.within(row, d) - gates.within(column, d));
        scores[j][i] = score;
      }
    }
}

// Grid: chunks times tiles of values, heads times batch; the four warps of a block take 16 tokens each. `work` is null
// where every state is zero.
template <int kKey, int kValue, int kTile, int kDecay, int kRates>
__device__ void scan_outputs(const float* q, const float* k, const float* v, const float* g, const float* work,
                             float* o, ScanShape shape, Strides q_strides, Strides k_strides, Strides v_strides,
                             Strides o_strides, GateStrides g_strides, Constants<kRates> rates) {
  constexpr int kStride = kKey + 4, kValueStride = kTile + 4;
  float* q_shared = reinterpret_cast<float*>(dynamic_shared());
  float* k_shared = q_shared + kScanChunk * kStride;
  float* v_shared = k_shared + kScanChunk * kStride;
  ScanGates<kKey, kDecay> gates{v_shared + kScanChunk * kValueStride};
  int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4, mine = threadIdx.x / 32 * kScanPart;
  ScanPlace at = scan_place<kValue, kTile>(shape.heads);
  int first = at.chunk * kScanChunk;
  q += at.batch * q_strides.batch + at.head * q_strides.head;
  k += at.batch * k_strides.batch + at.head * k_strides.head;
  v += at.batch * v_strides.batch + at.head * v_strides.head + at.column;
  o += at.batch * o_strides.batch + at.head * o_strides.head + at.column;
  if (g) g += at.batch * g_strides.batch + at.head * g_strides.head;
  scan_load<kKey>(q_shared, q, q_strides.token, first, shape.tokens);
  scan_load<kKey>(k_shared, k, k_strides.token, first, shape.tokens);
  scan_load<kTile>(v_shared, v, v_strides.token, first, shape.tokens);
  copy_commit();
  gates.fill(g, g_strides, rates.of[kRates == 1 ? 0 : at.head], first, shape.tokens);
  copy_wait<0>();
  __syncthreads();
  float outputs[kTile / 8][4] = {};
  if (work) {
    const float* state = work + (int64_t(blockIdx.y) * shape.chunks + at.chunk) * kKey * kValue + at.column + group;
#pragma unroll 2
    for (int s = 0; s < kKey; s += 8) {
      float parts[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int row = mine + group + i % 2 * 8, d = s + pair + i / 2 * 4;
        parts[i] = q_shared[row * kStride + d] * gates.raise(gates.since_start(row, d));
      }
      Split<4> left(parts);
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j)
        multiply_split(outputs[j], left,
                       Split<2>({state[(s + pair) * kValue + 8 * j], state[(s + pair + 4) * kValue + 8 * j]}));
    }
  }
  for (int other = 0; other <= mine; other += kScanPart) {
    float scores[2][4] = {};
    if (kDecay != kKeyDecay || other < mine) scan_scores(scores, q_shared, k_shared, gates, mine, other, group, pair);
    scan_finish(scores, q_shared, k_shared, gates, mine, other, group, pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Split<4> left({scores[half][0], scores[half][2], scores[half][1], scores[half][3]});
      const float* values = v_shared + (other + 8 * half + 2 * pair) * kValueStride + group;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j)
        multiply_split(outputs[j], left, Split<2>({values[8 * j], values[kValueStride + 8 * j]}));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = first + mine + 8 * half + group;
    if (row < shape.tokens)
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j)
        *reinterpret_cast<float2*>(o + row * o_strides.token + 8 * j + 2 * pair) = {
            outputs[j][2 * half] * shape.scale, outputs[j][2 * half + 1] * shape.scale};
  }
}

}  // namespace nas

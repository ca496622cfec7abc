// What only Hopper has, for emulate.h: tensor maps and bulk copies, barriers that count bytes, warpgroup products.
//
// A bulk copy lands when somebody waits for its barrier, a product when its group is waited for: what is used too early
// holds old numbers. Swizzles and the strides of descriptors are followed byte by byte. Not covered: the wait is each
// thread's own here, fences do nothing, registers are never traded.
#pragma once
#include <map>

namespace nas {

struct alignas(64) TensorMap {
  const char* base;
  int32_t rank, swizzled;
  int64_t sizes[4], strides[4];  // elements, bytes
  int32_t box[4];
};

}  // namespace nas

namespace emulation {

struct TileCopy {
  unsigned char* to;
  const nas::TensorMap* map;
  int at[4];
};
struct Barrier {
  int count = 0, pending = 0;
  long bytes = 0, phase = 0;
  std::vector<TileCopy> copies;

  void settle() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = count;
      progress();
    }
  }
};
inline std::map<uint64_t*, Barrier> barriers;

inline size_t swizzle(size_t place) { return place ^ ((place >> 7 & 7) << 4); }

inline unsigned char* shared_start() {
  auto start = reinterpret_cast<uintptr_t>(shared.data());
  return shared.data() + ((1024 - start % 1024) % 1024);
}

// Copies a box, its first axis fastest; zeros outside the tensor.
inline long land(const TileCopy& copy) {
  const nas::TensorMap& map = *copy.map;
  int box[4] = {1, 1, 1, 1};
  std::copy(map.box, map.box + map.rank, box);
  size_t start = size_t(copy.to - shared_start()), place = 0;
  if (start % 1024) std::exit((std::fprintf(stderr, "a tile starts at byte %zu\n", start), 5));
  for (int d = 0; d < box[3]; ++d)
    for (int c = 0; c < box[2]; ++c)
      for (int b = 0; b < box[1]; ++b)
        for (int a = 0; a < box[0]; ++a, place += 2) {
          int at[4] = {copy.at[0] + a, copy.at[1] + b, copy.at[2] + c, copy.at[3] + d};
          bool inside = true;
          int64_t offset = 0;
          for (int axis = 0; axis < map.rank; ++axis) {
            inside = inside && at[axis] >= 0 && at[axis] < map.sizes[axis];
            offset += at[axis] * map.strides[axis];
          }
          uint16_t value = 0;
          if (inside) std::memcpy(&value, map.base + offset, 2);
          size_t to = start + place;
          std::memcpy(shared_start() + (map.swizzled ? swizzle(to) : to), &value, 2);
        }
  return long(place);
}

struct Product {
  std::function<void()> run;
};
inline std::vector<std::vector<Product>> open_products(1024);
inline std::vector<std::deque<std::vector<Product>>> product_groups(1024);

// Element of a swizzled operand: `row` along rows or columns of the product, `k` along its depth.
inline uint16_t operand(uint64_t descriptor, bool transposed, int row, int k) {
  size_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  size_t stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) std::exit(6);
  size_t place = transposed ? row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                            : row / 8 * stride + row % 8 * 128 + k * 2;
  uint16_t value;
  std::memcpy(&value, shared_start() + swizzle(start + place), 2);
  return value;
}

}  // namespace emulation

namespace nas {

inline void barrier_start(uint64_t* barrier, int count) {
  emulation::barriers[barrier] = emulation::Barrier();
  emulation::barriers[barrier].count = emulation::barriers[barrier].pending = count;
}
inline void barrier_fence() {}
inline void barrier_arrive(uint64_t* barrier) {
  auto& found = emulation::barriers.at(barrier);
  --found.pending;
  found.settle();
}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emulation::barriers.at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, int parity) {
  auto& found = emulation::barriers.at(barrier);
  while (found.phase % 2 == parity) {
    for (auto& copy : found.copies) found.bytes -= emulation::land(copy);
    bool landed = !found.copies.empty();
    found.copies.clear();
    if (landed) found.settle();
    if (found.phase % 2 == parity) emulation::yield();
  }
}

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const unsigned char*>(pointer) - emulation::shared_start());
}
inline void tile_load(void* to, const TensorMap& map, uint64_t* barrier, int x, int y, int z = 0, int w = 0) {
  emulation::barriers.at(barrier).copies.push_back({static_cast<unsigned char*>(to), &map, {x, y, z, w}});
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& open = emulation::open_products[emulation::current];
  emulation::product_groups[emulation::current].push_back(std::move(open));
  open.clear();
}
template <int pending>
inline void wgmma_wait() {
  auto& groups = emulation::product_groups[emulation::current];
  for (; groups.size() > size_t(pending); groups.pop_front())
    for (auto& product : groups.front()) product.run();
  __syncwarp();
}
template <int tiles>
inline void wgmma_hold(float (&)[tiles][4]) {}
template <int>
inline void registers_raise() {}
template <int>
inline void registers_lower() {}

template <typename Type, int columns, bool transposed>
struct Wgmma {
  // d += left b, where left(row, k) gives the rows of this lane: `half` 0 or 1, eight apart.
  template <typename Left>
  static void add(float (*d)[4], uint64_t b, int keep, Left left) {
    float rows[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) rows[half][k] = left(half, k);
    int pair = emulation::current % 4;
    for (int j = 0; j < columns / 8; ++j)
      for (int c = 0; c < 2; ++c) {
        float right[16];
        for (int k = 0; k < 16; ++k)
          right[k] = Type::read(emulation::operand(b, transposed, 8 * j + 2 * pair + c, k));
        for (int half = 0; half < 2; ++half) {
          double sum = keep ? d[j][2 * half + c] : 0.0;
          for (int k = 0; k < 16; ++k) sum += double(rows[half][k]) * right[k];
          d[j][2 * half + c] = float(sum);
        }
      }
  }
  static void start(std::function<void()> run) {
    emulation::open_products[emulation::current].push_back({std::move(run)});
  }
  static void shared(float (&d)[columns / 8][4], uint64_t a, uint64_t b, int keep) {
    float(*sums)[4] = d;
    start([=] {
      int row = emulation::current % 128 / 32 * 16 + emulation::current % 32 / 4;
      add(sums, b, keep,
          [&](int half, int k) { return Type::read(emulation::operand(a, false, row + 8 * half, k)); });
    });
  }
  static void registers(float (&d)[columns / 8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
    float(*sums)[4] = d;
    const uint32_t* mine = a;
    start([=] {
      uint64_t words[4] = {mine[0], mine[1], mine[2], mine[3]};
      auto all = emulation::exchange(words, 4);
      int group = emulation::current % 32 / 4;
      add(sums, b, keep, [&](int half, int k) {
        return Type::read(uint16_t(all[4 * group + k % 8 / 2][half + 2 * (k / 8)] >> (16 * (k % 2))));
      });
    });
  }
};

}  // namespace nas

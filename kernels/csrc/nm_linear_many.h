// nm_linear for many tokens, bound by arithmetic: a lane is a token, a weight meets only the column it is kept for.
//
//   for every kPassTokens tokens                      bounds the working memory
//     turn the activations to [column block][tile of tokens][column][token], shared by all threads
//     for every kGroupBlocks blocks of rows that this thread takes (shares.h)
//       for every column block: decode these blocks of rows (one at a time where a pair of tiles is all there is), then
//         for every pair of tiles, which stay in L1 meanwhile, for every block of rows, for every row: sparse_tiles
//       scale, add the bias, round, store
#ifndef MASKPRO_NM_LINEAR_MANY_H_
#define MASKPRO_NM_LINEAR_MANY_H_

#include <omp.h>
#include <string.h>

#include "elements.h"
#include "interleaved.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"
#include "scratch.h"
#include "shares.h"
#include "transpose.h"

namespace maskpro {

constexpr int64_t kPassTokens = 256;

// Vectors of tokens in a tile. Two loads a cycle feed two FMAs a cycle, less what a weight and its offset take: 2 loads
// for the 8 FMAs of a row and a pair of tiles. Eight sums also hide the latency of the FMAs.
constexpr int kTileVectors = 4;

// Of the activations of a pair of tiles, or of the only tile there is: a third of an L1 of 48 KiB, half of one of 32.
constexpr int64_t kPairBytes = 16384;

// Blocks of rows for which a column block's activations are read once: from L3, and into L1.
constexpr int64_t kGroupBlocks = 8;

// A kept weight of a decoded block of rows, and where its column lies in a tile.
struct Entry {
  float weight;
  int32_t offset;  // bytes
};

// Decodes whole chunks into entries [slots][16]; `first` is the tile's first column. Offsets of slots before or after
// the tile's columns are of no use.
template <class Isa, class Weight, int kBits>
[[gnu::noinline]] void decode(const uint8_t* chunk, int64_t chunks, const int32_t* bases, int32_t first,
                              Entry* entries) {
  constexpr int kVectors = Isa::kVectors;
  constexpr int kSlots = chunk_slots(kBits);
  for (int64_t c = 0; c < chunks; ++c) {
    typename Isa::Indices indices[kVectors] = {};
    if constexpr (kBits > 0) Isa::load_indices(chunk, indices);
    const Weight* values = reinterpret_cast<const Weight*>(chunk + chunk_index_bytes(kBits));
    for_slots<Isa, kSlots>([&](int j) {
      typename Isa::Vec w[kVectors];
      Isa::load_slot(values, j, w);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Isa::template store_entries<kBits>(&entries[v * Isa::kLanes].weight, w[v], indices[v], j, bases[j] - first);
      }
      entries += kBlockRows;
    });
    chunk += chunk_bytes(kBits, sizeof(Weight));
    bases += kSlots;
  }
}

// sums[r][t] += the kept weights of row r times their columns, for kRows rows and kVectors vectors of tokens.
//
//   entries  [slots][16], from the first row's on
//   x        a tile; the vectors beyond kTileVectors are of the next one, tile_floats on
//   sums     [kRows, tokens], rows sums_stride apart
template <class Isa, int kRows, int kVectors>
[[gnu::noinline]] void sparse_tiles(const Entry* entries, int64_t slots, const float* x, int64_t tile_floats,
                                    float* sums, int64_t sums_stride) {
  using Vec = typename Isa::Vec;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::zero();
  }
  const char* tiles[2] = {reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(x + tile_floats)};
  for (int64_t slot = 0; slot < slots; ++slot) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Isa::broadcast(&entries[r].weight);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const float* column = reinterpret_cast<const float*>(tiles[v / kTileVectors] + entries[r].offset);
        acc[r][v] = Isa::fma(weight, Isa::load(column + v % kTileVectors * Isa::kLanes), acc[r][v]);
      }
    }
    entries += kBlockRows;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + r * sums_stride + v * Isa::kLanes;
      Isa::store(to, Isa::add(Isa::load(to), acc[r][v]));
    }
  }
}

template <class Isa, class Weight, class Act, int kBits>
class ManyTokens {
 public:
  explicit ManyTokens(const NMLinear& call)
      : call_(call),
        sizes_(call.in_features, call.out_features, call.n, call.m, call.weight_dtype),
        columns_(call.tokens > kTileTokens ? kMostColumns / 2 : kMostColumns),
        column_blocks_((call.in_features + columns_ - 1) / columns_),
        tile_floats_(columns_ * kTileTokens),
        // One cache line more, or all rows' sums would fall into the same L1 sets.
        sums_stride_(tiles(call.tokens < kPassTokens ? call.tokens : kPassTokens) * kTileTokens + 16) {}

  int32_t operator()() {
    const int64_t slots = sizes_.chunks * kSlots;
    const int64_t most = call_.tokens < kPassTokens ? call_.tokens : kPassTokens;
    const int64_t x_floats = column_blocks_ * tiles(most) * tile_floats_;
    const int64_t sums_floats = kGroupBlocks * kBlockRows * sums_stride_;
    const int64_t thread_floats = sums_floats + kEntryFloats + kTurnFloats;
    float* scratch = thread_scratch(slots + x_floats + call_.threads * thread_floats);
    if (scratch == nullptr) return MASKPRO_NO_MEMORY;
    Shares shares(call_.threads, sizes_.blocks, 1);
    x_ = scratch;
    bases_ = reinterpret_cast<int32_t*>(scratch + x_floats + call_.threads * thread_floats);
    write_bases<Isa>(call_, slots, bases_);
#pragma omp parallel num_threads(call_.threads)
    {
      // The runtime may grant fewer threads than asked.
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      float* sums = scratch + x_floats + thread * thread_floats;
      Entry* entries = reinterpret_cast<Entry*>(sums + sums_floats);
      float* turned = sums + sums_floats + kEntryFloats;
      for (int64_t token = 0; token < call_.tokens; token += kPassTokens) {
        const int64_t rest = call_.tokens - token;
        const int64_t tokens = rest < kPassTokens ? rest : kPassTokens;
        turn_x(token, tokens, thread, threads, turned);
#pragma omp barrier
        for (int64_t block, end; shares.take(thread, kGroupBlocks, &block, &end);) {
          multiply(block, end, tokens, entries, sums);
          for (int64_t b = block; b < end; ++b) {
            store_block(b, token, tokens, sums + (b - block) * kBlockRows * sums_stride_);
          }
        }
        if (rest > kPassTokens) {
#pragma omp barrier
          shares.deal_again(thread, threads);
        }
      }
    }
    return MASKPRO_OK;
  }

 private:
  static constexpr int kSlots = chunk_slots(kBits);
  static constexpr int64_t kTileTokens = kTileVectors * Isa::kLanes;
  // Of a column block, where the call's tokens fill no second tile.
  static constexpr int64_t kMostColumns = kPairBytes / sizeof(float) / kTileTokens;
  // A column block may begin and end within a chunk.
  static constexpr int64_t kBlockEntries = (kMostColumns + 2 * kSlots) * kBlockRows;
  static constexpr int64_t kEntryFloats = kGroupBlocks * kBlockEntries * sizeof(Entry) / sizeof(float);
  // What a row fetches of the pair of tiles that comes next.
  static constexpr int64_t kRowFloats = kPairBytes / sizeof(float) / (kGroupBlocks * kBlockRows);
  static constexpr int64_t kTurnStride = kMostColumns + 16;  // or all tokens would fall into the same L1 sets
  static constexpr int64_t kTurnFloats = kTileTokens * kTurnStride;
  static_assert(kMostColumns / 2 % 32 == 0, "a column block is whole groups");
  static_assert(kTileTokens * sizeof(float) == 1 << Isa::kColumnShift, "bytes of a column in a tile");
  static_assert(kPassTokens % kTileTokens == 0, "a pass is whole tiles");

  static int64_t tiles(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

  float* tile(int64_t column_block, int64_t number, int64_t tokens) const {
    return x_ + (column_block * tiles(tokens) + number) * tile_floats_;
  }

  void turn_x(int64_t token, int64_t tokens, int64_t thread, int64_t threads, float* rows) const {
    const int64_t pieces = column_blocks_ * tiles(tokens);
    const int64_t end = pieces * (thread + 1) / threads;
    for (int64_t piece = pieces * thread / threads; piece < end; ++piece) {
      const int64_t column_block = piece % column_blocks_;
      const int64_t number = piece / column_blocks_;
      const int64_t column = column_block * columns_;
      const int64_t first = number * kTileTokens;
      const int64_t rest = call_.in_features - column;
      const int64_t count = rest < columns_ ? rest : columns_;
      for (int64_t t = 0; t < kTileTokens; ++t) {
        float* to = rows + t * kTurnStride;
        if (first + t >= tokens) {
          memset(to, 0, static_cast<size_t>(count) * sizeof(float));
          continue;
        }
        const Act* from = static_cast<const Act*>(call_.x) + (token + first + t) * call_.in_features + column;
        // More rows than the hardware follows: fetches what the next piece has of this one.
        for (int64_t ahead = columns_; ahead < rest && ahead < 2 * columns_; ahead += 64 / sizeof(Act)) {
          __builtin_prefetch(from + ahead);
        }
        convert<Isa>(from, count, to);
      }
      float* to = tile(column_block, number, tokens);
      for (int64_t c = 0; c < count; c += Isa::kLanes) {  // past the last column it turns what nobody reads
        for (int64_t t = 0; t < kTileTokens; t += Isa::kLanes) {
          transpose<Isa>(rows + t * kTurnStride + c, kTurnStride, to + c * kTileTokens + t, kTileTokens);
        }
      }
    }
  }

  // sums = W x^T for the blocks [block, end) of one group: [row][token].
  void multiply(int64_t block, int64_t end, int64_t tokens, Entry* entries, float* sums) const {
    // A single pair of tiles stays in L1 anyhow, and the entries of one block of rows beside it.
    const int64_t together = tiles(tokens) > 2 ? kGroupBlocks : 1;
    memset(sums, 0, static_cast<size_t>((end - block) * kBlockRows * sums_stride_) * sizeof(float));
    for (int64_t columns = 0; columns < column_blocks_; ++columns) {
      const int64_t column = columns * columns_;
      const int64_t column_end = column + columns_ < call_.in_features ? column + columns_ : call_.in_features;
      const int64_t slot = column / call_.m * call_.n;
      const int64_t slot_end = column_end / call_.m * call_.n;
      const int64_t chunk = slot / kSlots;
      const int64_t chunks = (slot_end + kSlots - 1) / kSlots - chunk;
      const int64_t skipped = (slot - chunk * kSlots) * kBlockRows;
      for (int64_t b = block; b < end; b += together) {
        const int64_t blocks = end - b < together ? end - b : together;
        for (int64_t i = 0; i < blocks; ++i) {
          const uint8_t* from =
              call_.weight + (b + i) * sizes_.block_bytes + chunk * chunk_bytes(kBits, sizeof(Weight));
          decode<Isa, Weight, kBits>(from, chunks, bases_ + chunk * kSlots, static_cast<int32_t>(column),
                                     entries + i * kBlockEntries);
        }
        for (int64_t number = 0; number < tiles(tokens); number += 2) {
          const int64_t first = number * kTileTokens;
          const float* x = tile(columns, number, tokens);
          const float* next = x + (tiles(tokens) - number > 1 ? 2 : 1) * tile_floats_;
          if (next == x_ + column_blocks_ * tiles(tokens) * tile_floats_) next = x_;  // the next group's first
          for (int64_t i = 0; i < blocks; ++i) {
            const int64_t place = b - block + i;
            multiply_tiles<2 * kTileVectors>(tokens - first, entries + i * kBlockEntries + skipped, slot_end - slot, x,
                                             next + place * kBlockRows * kRowFloats,
                                             sums + place * kBlockRows * sums_stride_ + first);
          }
        }
      }
    }
  }

  // Finds as few vectors as hold the tokens, of a tile or two. Meanwhile it fetches this block's part of the pair of
  // tiles that comes next.
  template <int kVectors>
  void multiply_tiles(int64_t tokens, const Entry* entries, int64_t slots, const float* x, const float* next,
                      float* sums) const {
    if constexpr (kVectors > 1) {
      if (tokens <= (kVectors - 1) * Isa::kLanes) {
        return multiply_tiles<kVectors - 1>(tokens, entries, slots, x, next, sums);
      }
    }
    constexpr int kRows = kVectors > kTileVectors ? 1 : 2;
    for (int r = 0; r < kBlockRows; r += kRows) {
      for (int64_t i = 0; i < kRows * kRowFloats; i += 16) __builtin_prefetch(next + r * kRowFloats + i);
      sparse_tiles<Isa, kRows, kVectors>(entries + r, slots, x, tile_floats_, sums + r * sums_stride_, sums_stride_);
    }
  }

  void store_block(int64_t block, int64_t token, int64_t tokens, const float* sums) const {
    const BlockOutputs<Isa, Act> outputs(call_, block);
    alignas(64) float values[Isa::kLanes * kBlockRows];
    for (int64_t first = 0; first < tokens; first += Isa::kLanes) {
      for (int64_t r = 0; r < kBlockRows; r += Isa::kLanes) {
        transpose<Isa>(sums + r * sums_stride_ + first, sums_stride_, values + r, kBlockRows);
      }
      for (int64_t t = first; t < tokens && t < first + Isa::kLanes; ++t) {
        outputs.store(token + t, values + (t - first) * kBlockRows);
      }
    }
  }

  const NMLinear& call_;
  const Interleaved sizes_;
  const int64_t columns_;  // of a column block: those of one tile, or half as many of two
  const int64_t column_blocks_;
  const int64_t tile_floats_;
  const int64_t sums_stride_;
  float* x_ = nullptr;
  int32_t* bases_ = nullptr;
};

}  // namespace maskpro

#endif  // MASKPRO_NM_LINEAR_MANY_H_

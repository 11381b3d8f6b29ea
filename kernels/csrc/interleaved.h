// The order in which the kernels read a packed weight: sixteen rows side by side, so that lanes are outputs.
//
// Kept as FORMAT.md stores it, a row alone knows where its values belong, and a vector of them must be dealt to columns
// through tables, a byte of bitmask at a time. With a row in each lane, slot i of every row (its i-th kept value) lies
// in the same group of m columns, and which of them is an index of two to five bits: one permute of the group's
// activations fetches every lane's own. Nothing is expanded, nothing is multiplied with zero, no lanes are summed.
//
// A weight is [block of 16 rows][chunk of slots]; a chunk is
//
//   indices  [16] uint32: in row r's, slot j's column within its group at bits [j * index_bits, (j + 1) * index_bits);
//            left out where every column is kept
//   values   [slots][16]; of bfloat16 [slots / 2][16][2], so that a row's two are the operand of a product of pairs, and
//            a shift and an AND make float32 of sixteen rows' first and second
//
// Rows past the last and slots past a row's last have zero values and indices. A kept value takes its bits and 2, 3.2, 4
// or 5.33 of an index for m = 4, 8, 16 or 32: 2:4 takes 9 bits a weight in bfloat16, as in FORMAT.md's order. This
// order is private to a process: it is made when a weight is loaded, and may change.
#ifndef MASKPRO_INTERLEAVED_H_
#define MASKPRO_INTERLEAVED_H_

#include <stdint.h>

#include "maskpro_kernels.h"

namespace maskpro {

constexpr int kBlockRows = 16;

// 0 where every column is kept.
constexpr int32_t index_bits(int32_t n, int32_t m) {
  return n == m ? 0 : m == 4 ? 2 : m == 8 ? 3 : m == 16 ? 4 : 5;
}

// Even for every number of bits there is: a pair of slots lies in one chunk.
constexpr int chunk_slots(int32_t bits) { return bits == 0 ? 16 : 32 / bits; }

constexpr int64_t chunk_index_bytes(int32_t bits) { return bits == 0 ? 0 : kBlockRows * 4; }

constexpr int64_t chunk_bytes(int32_t bits, int64_t element_bytes) {
  return chunk_index_bytes(bits) + chunk_slots(bits) * kBlockRows * element_bytes;
}

constexpr int64_t element_bytes(int32_t dtype) {
  return dtype == MASKPRO_F32 ? 4 : dtype == MASKPRO_I8 ? 1 : 2;
}

// Sizes of one interleaved weight.
struct Interleaved {
  int32_t bits;
  int64_t kept;  // slots of a row
  int64_t chunks;  // of a block
  int64_t block_bytes;
  int64_t blocks;

  // Inlined, so that no copy compiled for one instruction set is called from another.
  [[gnu::always_inline]] Interleaved(int64_t in_features, int64_t out_features, int32_t n, int32_t m, int32_t dtype)
      : bits(index_bits(n, m)),
        kept(in_features / m * n),
        chunks((kept + chunk_slots(bits) - 1) / chunk_slots(bits)),
        block_bytes(chunks * chunk_bytes(bits, element_bytes(dtype))),
        blocks((out_features + kBlockRows - 1) / kBlockRows) {}
};

}  // namespace maskpro

#endif  // MASKPRO_INTERLEAVED_H_

// A square of numbers turned in registers.
#ifndef MASKPRO_TRANSPOSE_H_
#define MASKPRO_TRANSPOSE_H_

#include <stdint.h>

#include <utility>

namespace maskpro {

// One of log2(lanes) perfect shuffles of all numbers, after which rows are columns: rows i and i + lanes / 2 are dealt
// in turns to rows 2 i and 2 i + 1.
template <class Isa, int... kLane>
[[gnu::always_inline]] inline void shuffle_rows(typename Isa::Vec (&rows)[Isa::kLanes],
                                                std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = Isa::kLanes / 2;
  typedef int32_t Lanes __attribute__((vector_size(Isa::kLanes * sizeof(int32_t))));
  constexpr Lanes kFirst = {(kLane / 2 + kLane % 2 * Isa::kLanes)...};
  constexpr Lanes kSecond = {(kHalf + kLane / 2 + kLane % 2 * Isa::kLanes)...};
  typename Isa::Vec shuffled[Isa::kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    shuffled[2 * i] = __builtin_shuffle(rows[i], rows[i + kHalf], kFirst);
    shuffled[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kHalf], kSecond);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Isa::kLanes; ++i) rows[i] = shuffled[i];
}

// to[i][j] = from[j][i] for a square of kLanes rows of kLanes numbers, rows the given strides apart.
template <class Isa>
[[gnu::always_inline]] inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typename Isa::Vec rows[Isa::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < Isa::kLanes; ++i) rows[i] = Isa::load(from + i * from_stride);
#pragma GCC unroll 4
  for (int left = Isa::kLanes; left > 1; left /= 2) {
    shuffle_rows<Isa>(rows, std::make_integer_sequence<int, Isa::kLanes>());
  }
#pragma GCC unroll 16
  for (int i = 0; i < Isa::kLanes; ++i) Isa::store(to + i * to_stride, rows[i]);
}

}  // namespace maskpro

#endif  // MASKPRO_TRANSPOSE_H_

// Activations and outputs of any storage type, to float32 and back.
#ifndef MASKPRO_ELEMENTS_H_
#define MASKPRO_ELEMENTS_H_

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "element_types.h"
#include "interleaved.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"

namespace maskpro {

// Calls `use` with a null pointer of the storage type that `dtype` names.
template <class Use>
inline auto with_float(int32_t dtype, const Use& use) {
  switch (dtype) {
    case MASKPRO_F32:
      return use(static_cast<float*>(nullptr));
    case MASKPRO_BF16:
      return use(static_cast<BF16*>(nullptr));
    default:
      return use(static_cast<F16*>(nullptr));
  }
}

template <class Use>
inline auto with_element(int32_t dtype, const Use& use) {
  if (dtype == MASKPRO_I8) return use(static_cast<int8_t*>(nullptr));
  return with_float(dtype, use);
}

// Calls `use` with every slot of a chunk; unrolled where a shift by a constant is what makes it fast.
template <class Isa, int kSlots, class Use>
[[gnu::always_inline]] inline void for_slots(const Use& use) {
  if constexpr (Isa::kUnrollSlots) {
#pragma GCC unroll 16
    for (int j = 0; j < kSlots; ++j) use(j);
  } else {
    for (int j = 0; j < kSlots; ++j) use(j);
  }
}

template <class Isa, class Element>
inline typename Isa::Vec load_partial(const Element* p, int64_t count) {
  Element padded[Isa::kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count) * sizeof(Element));
  return Isa::load(padded);
}

// Writes `count` floats, and zeros up to a whole vector.
template <class Isa, class Element>
inline void convert(const Element* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Isa::kLanes) {
    const int64_t rest = count - i;
    Isa::store(to + i, rest >= Isa::kLanes ? Isa::load(from + i) : load_partial<Isa>(from + i, rest));
  }
}

// The first column of each slot's group; slots past a row's last repeat it.
// (Isa only keeps the copies of different compiler flags apart.)
template <class Isa>
inline void write_bases(const NMLinear& call, int64_t slots, int32_t* bases) {
  int64_t slot = 0;
  const int32_t width = call.n == call.m ? 1 : call.m;
  const int32_t kept = call.n == call.m ? 1 : call.n;
  const int32_t last = static_cast<int32_t>(call.in_features) - width;
  for (int32_t base = 0; base <= last; base += width) {
    for (int32_t k = 0; k < kept; ++k) bases[slot++] = base;
  }
  while (slot < slots) bases[slot++] = last;
}

// Turns a block's sums into outputs.
template <class Isa, class Act>
class BlockOutputs {
 public:
  BlockOutputs(const NMLinear& call, int64_t block)
      : y_(static_cast<Act*>(call.y) + block * kBlockRows),
        stride_(call.out_features),
        rows_(call.out_features - block * kBlockRows) {
    if (rows_ > kBlockRows) rows_ = kBlockRows;
    const int64_t row = block * kBlockRows;
    for (int r = 0; r < kBlockRows; ++r) scale_[r] = 1.0F, bias_[r] = 0.0F;
    if (call.scale != nullptr) memcpy(scale_, call.scale + row, static_cast<size_t>(rows_) * sizeof(float));
    if (call.bias != nullptr) {
      with_float(call.bias_dtype, [&](auto* element) {
        using Element = std::remove_pointer_t<decltype(element)>;
        convert<Isa>(static_cast<const Element*>(call.bias) + row, rows_, bias_);
      });
    }
  }

  // Scales one token's sums of the block, adds the bias, rounds and stores.
  void store(int64_t token, const float* sums) const {
    Act* y = y_ + token * stride_;
    for (int64_t r = 0; r < rows_; r += Isa::kLanes) {
      const auto value = Isa::fma(Isa::load(sums + r), Isa::load(scale_ + r), Isa::load(bias_ + r));
      if (rows_ - r >= Isa::kLanes) {
        Isa::store(y + r, value);
      } else {
        Act padded[Isa::kLanes];
        Isa::store(padded, value);
        memcpy(y + r, padded, static_cast<size_t>(rows_ - r) * sizeof(Act));
      }
    }
  }

 private:
  Act* y_;
  int64_t stride_;
  int64_t rows_;
  float scale_[kBlockRows];
  float bias_[kBlockRows];
};

// Outputs of the tokens from `token` on, of blocks of rows: token by token for an even block and the next one, which
// share a line of y.
//
//   sums  [block][tokens][16], blocks sums_stride floats apart
template <class Isa, class Act>
inline void store_outputs(const NMLinear& call, int64_t block, int64_t end, int64_t token, int64_t tokens,
                          const float* sums, int64_t sums_stride) {
  while (block < end) {
    const BlockOutputs<Isa, Act> first(call, block);
    if (block % 2 != 0 || end - block == 1) {
      for (int64_t t = 0; t < tokens; ++t) first.store(token + t, sums + t * kBlockRows);
      block += 1;
      sums += sums_stride;
      continue;
    }
    const BlockOutputs<Isa, Act> second(call, block + 1);
    for (int64_t t = 0; t < tokens; ++t) {
      first.store(token + t, sums + t * kBlockRows);
      second.store(token + t, sums + sums_stride + t * kBlockRows);
    }
    block += 2;
    sums += 2 * sums_stride;
  }
}

}  // namespace maskpro

#endif  // MASKPRO_ELEMENTS_H_

// Rows of any storage type to float32 and back.
#ifndef MASKPRO_ELEMENTS_H_
#define MASKPRO_ELEMENTS_H_

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "element_types.h"
#include "maskpro_kernels.h"
#include "nm_linear.h"

namespace maskpro {

// Calls `use` with a null pointer of the storage type that `dtype` names.
template <class Use>
inline auto with_element(int32_t dtype, const Use& use) {
  switch (dtype) {
    case MASKPRO_F32:
      return use(static_cast<float*>(nullptr));
    case MASKPRO_BF16:
      return use(static_cast<BF16*>(nullptr));
    default:
      return use(static_cast<F16*>(nullptr));
  }
}

template <class Isa, class Element>
inline typename Isa::Vec load_partial(const Element* p, int64_t count) {
  Element padded[Isa::kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count) * sizeof(Element));
  return Isa::load(padded);
}

// Writes `count` floats, and zeros up to a whole step; parted into even and odd columns if asked.
template <class Isa, bool kEvenOdd, class Element>
inline void convert(const Element* from, int64_t count, float* to) {
  constexpr int64_t kStepColumns = Isa::kLanes * Isa::kStepVectors;
  for (int64_t column = 0; column < count; column += kStepColumns) {
    typename Isa::Vec v[Isa::kStepVectors];
    for (int i = 0; i < Isa::kStepVectors; ++i) {
      const int64_t rest = count - column - i * Isa::kLanes;
      const Element* p = from + column + i * Isa::kLanes;
      v[i] = rest >= Isa::kLanes ? Isa::load(p) : rest > 0 ? load_partial<Isa>(p, rest) : Isa::zero();
    }
    if constexpr (kEvenOdd) Isa::part_even_odd(v);
    for (int i = 0; i < Isa::kStepVectors; ++i) Isa::store(to + column + i * Isa::kLanes, v[i]);
  }
}

// Activations for weights of `weight_dtype`, in the order of their lanes.
template <class Isa, class Act>
inline void convert_activations(const Act* from, int64_t count, int32_t weight_dtype, float* to) {
  if (Isa::kEvenOddBF16 && weight_dtype == MASKPRO_BF16) {
    convert<Isa, Isa::kEvenOddBF16>(from, count, to);
  } else {
    convert<Isa, false>(from, count, to);
  }
}

// Writes the bias of the outputs [row, row + rows), zeros if there is none, up to a whole step.
template <class Isa>
inline void load_bias(const NMLinear& call, int64_t row, int64_t rows, float* bias) {
  if (call.bias == nullptr) {
    memset(bias, 0, static_cast<size_t>(rows + Isa::kLanes * Isa::kStepVectors) * sizeof(float));
    return;
  }
  with_element(call.bias_dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    convert<Isa, false>(static_cast<const Element*>(call.bias) + row, rows, bias);
  });
}

// Adds the bias to the sums of `rows` consecutive outputs of one token, rounds and stores them.
template <class Isa, class Act>
inline void store_outputs(const float* sums, const float* bias, int64_t rows, Act* y) {
  for (int64_t r = 0; r < rows; r += Isa::kLanes) {
    const auto value = Isa::add(Isa::load(sums + r), Isa::load(bias + r));
    if (rows - r >= Isa::kLanes) {
      Isa::store(y + r, value);
    } else {
      Act padded[Isa::kLanes];
      Isa::store(padded, value);
      memcpy(y + r, padded, static_cast<size_t>(rows - r) * sizeof(Act));
    }
  }
}

}  // namespace maskpro

#endif  // MASKPRO_ELEMENTS_H_

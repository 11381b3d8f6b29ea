// The bits of FORMAT.md's bitmask, a group at a time.
#ifndef MASKPRO_GROUP_BITS_H_
#define MASKPRO_GROUP_BITS_H_

#include <stdint.h>
#include <string.h>

namespace maskpro {

// Which columns group g of a row keeps, of groups of kM = 4, 8, 16 or 32.
template <int kM>
inline uint32_t group_bits(const uint8_t* row, int64_t group) {
  if constexpr (kM == 4) return row[group / 2] >> (4 * (group % 2)) & 15u;
  uint32_t bits = 0;
  memcpy(&bits, row + group * (kM / 8), kM / 8);
  return bits;
}

inline uint32_t group_bits(const uint8_t* row, int64_t group, int32_t m) {
  switch (m) {
    case 4:
      return group_bits<4>(row, group);
    case 8:
      return group_bits<8>(row, group);
    case 16:
      return group_bits<16>(row, group);
    default:
      return group_bits<32>(row, group);
  }
}

// Clears the lowest set bit and returns its number; 0 where none is set.
inline uint32_t take_lowest(uint32_t& bits) {
  const uint32_t lowest = bits == 0 ? 0 : static_cast<uint32_t>(__builtin_ctz(bits));
  bits &= bits - 1;
  return lowest;
}

}  // namespace maskpro

#endif  // MASKPRO_GROUP_BITS_H_

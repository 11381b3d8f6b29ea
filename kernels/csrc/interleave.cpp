// Brings a weight of FORMAT.md into the order of interleaved.h.
#include <omp.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "arguments.h"
#include "group_bits.h"
#include "interleaved.h"
#include "maskpro_kernels.h"

namespace maskpro {
namespace {

// Asks for large pages under memory that is about to be written: few tokens then read it faster, for there are fewer
// translations to look up, and prefetchers stop at the end of a page. Nothing changes where it is refused.
void ask_for_large_pages([[maybe_unused]] uint8_t* begin, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + page - 1) / page * page;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Source {
  const uint8_t* values;
  const uint8_t* bitmask;
  int64_t in_features;
  int64_t out_features;
  int32_t n;
  int32_t m;
  int32_t dtype;
};

// Where a row's value of slot j lies among a chunk's.
int64_t place(int64_t row, int64_t j, int32_t dtype) {
  return dtype == MASKPRO_BF16 ? (j / 2 * kBlockRows + row) * 2 + j % 2 : j * kBlockRows + row;
}

template <int kBytes>
void interleave_row(const Source& from, const Interleaved& sizes, int64_t row, uint8_t* block) {
  const uint8_t* values = from.values + row * sizes.kept * kBytes;
  const bool dense = sizes.bits == 0;
  const uint8_t* bitmask = dense ? nullptr : from.bitmask + row * ((from.in_features + 7) / 8);
  const int64_t lane = row % kBlockRows;
  const int slots = chunk_slots(sizes.bits);
  const int64_t index_bytes = chunk_index_bytes(sizes.bits);
  const int64_t bytes = index_bytes + slots * kBlockRows * kBytes;
  int64_t slot = 0;
  for (int64_t group = 0; group < from.in_features / from.m; ++group) {
    uint32_t bits = dense ? 0 : group_bits(bitmask, group, from.m);
    // Exactly n, whatever the bitmask says: a wrong one gives wrong results, but no access elsewhere.
    for (int32_t k = 0; k < from.n; ++k, ++slot) {
      uint8_t* chunk = block + slot / slots * bytes;
      const int64_t j = slot % slots;
      memcpy(chunk + index_bytes + place(lane, j, from.dtype) * kBytes, values + slot * kBytes, kBytes);
      if (dense) continue;
      const uint32_t column = take_lowest(bits);
      uint32_t word;
      memcpy(&word, chunk + 4 * lane, sizeof word);
      word |= column << (j * sizes.bits);
      memcpy(chunk + 4 * lane, &word, sizeof word);
    }
  }
}

void interleave_block(const Source& from, const Interleaved& sizes, int64_t block, uint8_t* to) {
  memset(to, 0, static_cast<size_t>(sizes.block_bytes));
  const int64_t end = (block + 1) * kBlockRows;
  for (int64_t row = block * kBlockRows; row < end && row < from.out_features; ++row) {
    switch (element_bytes(from.dtype)) {
      case 4:
        interleave_row<4>(from, sizes, row, to);
        break;
      case 2:
        interleave_row<2>(from, sizes, row, to);
        break;
      default:
        interleave_row<1>(from, sizes, row, to);
    }
  }
}

}  // namespace
}  // namespace maskpro

int64_t maskpro_interleaved_bytes(int64_t in_features, int64_t out_features, int32_t n, int32_t m, int32_t weight_dtype) {
  if (!maskpro::is_weight(in_features, out_features, n, m, weight_dtype)) return -1;
  const maskpro::Interleaved sizes(in_features, out_features, n, m, weight_dtype);
  return sizes.blocks * sizes.block_bytes;
}

int32_t maskpro_interleave(void* weight, const void* values, const uint8_t* bitmask, int64_t in_features,
                           int64_t out_features, int32_t n, int32_t m, int32_t weight_dtype, int32_t threads) {
  if (!maskpro::is_weight(in_features, out_features, n, m, weight_dtype) || threads < 1) return MASKPRO_BAD_ARGUMENT;
  if (out_features == 0) return MASKPRO_OK;
  if (weight == nullptr || values == nullptr || (bitmask == nullptr && n < m)) return MASKPRO_BAD_ARGUMENT;
  const maskpro::Source source{static_cast<const uint8_t*>(values), bitmask, in_features, out_features, n, m,
                               weight_dtype};
  const maskpro::Interleaved sizes(in_features, out_features, n, m, weight_dtype);
  uint8_t* to = static_cast<uint8_t*>(weight);
  maskpro::ask_for_large_pages(to, sizes.blocks * sizes.block_bytes);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < sizes.blocks; ++block) {
    maskpro::interleave_block(source, sizes, block, to + block * sizes.block_bytes);
  }
  return MASKPRO_OK;
}

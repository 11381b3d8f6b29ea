// Tile registers of AMX: eight of 16 rows of 64 bytes, whose product adds pairs of bfloat16 to float32, or four products
// of int8 to int32.
#ifndef MASKPRO_AMX_TILES_H_
#define MASKPRO_AMX_TILES_H_

#include <immintrin.h>
#include <stdint.h>

#include "decode_tiles.h"

namespace maskpro {
namespace {

// The first `rest` of 32 columns, or all if there are more.
inline __mmask32 first_columns(int64_t rest) { return rest >= 32 ? ~__mmask32{0} : (__mmask32{1} << rest) - 1; }

// The calling thread's tile registers, set up while in scope: 0 to 3 are sums [rows][16 rows of a weight] of 32 bits, 4
// and 5 activations [rows][64 bytes], 6 and 7 weights [16][16 rows][4 bytes]. Others who use tiles load their own
// configuration before they do; nothing is left in the registers, which the system would have to save.
class ConfiguredTiles {
 public:
  explicit ConfiguredTiles(int64_t rows) {
    Config config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kTileRowBytes;
      config.rows[tile] = tile < 6 ? static_cast<uint8_t>(rows) : 16;
    }
    // The compiler believes that only a pointer's bytes of it are read.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~ConfiguredTiles() { _tile_release(); }
  ConfiguredTiles(const ConfiguredTiles&) = delete;
  ConfiguredTiles& operator=(const ConfiguredTiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64, "what LDTILECFG reads");
};

// The compiler does not know that loading a tile reads memory: what is to be read is written before this, what overwrites
// what was read comes after it.
[[gnu::always_inline]] inline void between_writes_and_tile_loads() { __asm__ volatile("" ::: "memory"); }

}  // namespace
}  // namespace maskpro

#endif  // MASKPRO_AMX_TILES_H_

// AMX's tiles as the residual blocks use them: four of sums, for 32x32 of them, two of features, two of weights. For files
// compiled for AMX alone: it includes nothing whose inline functions could end up in other hands, and what it holds is
// their own.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fastsimgan::amx_tiles {
namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not in a function: GCC takes an instruction that loads it to read 8 of its 64 bytes.
constexpr Config kConfig;

// What was written to memory is there for _tile_loadd: GCC does not know that this reads memory.
inline void finish_writes() { __asm__ volatile("" ::: "memory"); }

// All eight tiles at 16 rows of 64 bytes; afterwards as they were, for libraries that configure them once a thread.
struct Tiles {
  alignas(64) uint8_t before[64];
  Tiles() {
    _tile_storeconfig(before);
    finish_writes();
    _tile_loadconfig(&kConfig);
  }
  ~Tiles() {
    finish_writes();
    if (before[0] != 0)
      _tile_loadconfig(before);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;
};

// Tiles 0 to 3 as sums[row * 32 + column].
template <typename Sum>
inline void store_sums(Sum* sums) {
  static_assert(sizeof(Sum) == 4);
  constexpr int64_t kSide = 32, pitch = kSide * sizeof(Sum);
  _tile_stored(0, sums, pitch);
  _tile_stored(1, sums + 16, pitch);
  _tile_stored(2, sums + 16 * kSide, pitch);
  _tile_stored(3, sums + 16 * kSide + 16, pitch);
}

}  // namespace
}  // namespace fastsimgan::amx_tiles

// The strips of whole rows that the residual blocks in 16 and 8 bits take one after another, so that what is in between
// stays in a core's L2 cache. The numbers are the caller's: images [count, height, width, C].
#pragma once

#include <cstdint>

#include "always_inline.h"

namespace fastsimgan::residual_block_strips {

constexpr int64_t kMaps = 32;  // C must be a multiple of it
constexpr int64_t kInCache = 512 << 10;  // bytes of a strip's features in bfloat16; there are two to six of them

// What a pass works on.
struct Images {
  int64_t count, height, width, maps;
  FASTSIMGAN_ALWAYS_INLINE int64_t strips_an_image() const {
    const int64_t row_bytes = (width + 2) * maps * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t rows = kInCache / row_bytes > 8 ? kInCache / row_bytes : 8;
    return (height + rows - 1) / rows;
  }
  FASTSIMGAN_ALWAYS_INLINE int64_t strips() const { return count * strips_an_image(); }
  FASTSIMGAN_ALWAYS_INLINE int64_t weights() const { return 9 * maps * maps; }
};

}  // namespace fastsimgan::residual_block_strips

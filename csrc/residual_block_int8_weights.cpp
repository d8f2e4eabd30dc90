// The weights of residual_block_int8.h as its kernels take them.
#include <string.h>

#include "residual_block_int8.h"

namespace fastsimgan::residual_block_int8 {

int64_t packed_bytes(int64_t maps) { return maps / kMaps * group_bytes(maps); }

void pack_weights(const int8_t* weight, const int64_t* strides, int64_t maps, int8_t* packed) {
  for (int64_t out = 0; out < maps; out += kMaps)
    for (int64_t dy = 0; dy < 3; ++dy)
      for (int64_t segment = 0; segment < segments_of(maps); ++segment)
        for (int64_t half = 0; half < 2; ++half)
          for (int64_t four = 0; four < 16; ++four, packed += kSegment) {
            const int64_t k = segment * kSegment + 4 * four, dx = k / maps, in = k % maps;
            if (dx > 2) {
              memset(packed, 0, kSegment);
              continue;
            }
            const int8_t* from = weight + (out + 16 * half) * strides[0] + in * strides[1] + dy * strides[2] + dx * strides[3];
            for (int64_t column = 0; column < 16; ++column, from += strides[0])
              if (strides[1] == 1)  // channels_last: four times as fast
                memcpy(packed + 4 * column, from, 4);
              else
                for (int64_t i = 0; i < 4; ++i) packed[4 * column + i] = from[i * strides[1]];
          }
}

}  // namespace fastsimgan::residual_block_int8

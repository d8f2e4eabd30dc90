// residual_block_int8.h's block on AMX, Intel's matrix unit. This file alone is compiled for AMX's 8 bits.
#include "amx_tiles.h"
#include "residual_block_int8_avx512.h"

namespace fastsimgan::residual_block_int8 {
namespace {

struct Amx {
  const amx_tiles::Tiles tiles;

  static void sum(const Bordered<uint8_t>& in, int64_t q, const int8_t* weight, const int32_t* bias, int32_t* sums) {
    const int64_t maps = in.maps, segments = segments_of(maps);
    amx_tiles::finish_writes();
    _tile_loadd(0, bias, 0);  // the same for all positions
    _tile_loadd(1, bias + 16, 0);
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + 16, 0);
    for (int64_t dy = 0; dy < 3; ++dy) {
      const uint8_t* pixels = in.buffer.data + (q + dy * in.pitch) * maps;
      for (int64_t segment = 0; segment < segments; ++segment, pixels += kSegment, weight += 2 * kTile) {
        _tile_loadd(4, pixels, maps);
        _tile_loadd(6, weight, kSegment);
        _tile_loadd(7, weight + kTile, kSegment);
        _tile_loadd(5, pixels + 16 * maps, maps);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    }
    amx_tiles::store_sums(sums);
  }
};

}  // namespace

void forward_amx(const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale,
                 const Layer& first, const Layer& second, float* out) {
  forward<Amx>(images, from, to, in, in_scale, first, second, out);
}

}  // namespace fastsimgan::residual_block_int8

// The arithmetic of residual_block_int8.h. This file alone is compiled for VNNI and AMX's 8 bits, as
// residual_block_strips.h has it; only functions of an AMX unit execute its instructions.
//
// In memory the three taps of a kernel's row lie side by side: 3 C bytes from a position on. They are taken as segments of
// 64 bytes, the length of a tile's row; where the last is half full, its other weights are zeros.
#include "residual_block_int8.h"

#include "residual_block_strips.h"

namespace fastsimgan::int8 {
namespace {

using namespace amx;  // of residual_block_strips.h

constexpr int64_t kSegment = 64, kTile = 16 * kSegment;  // bytes

int64_t segments_of(int64_t maps) { return (3 * maps + kSegment - 1) / kSegment; }

// Bytes of the weights of kMaps output maps: [3, segments, 2 halves of the maps, 16 groups of inputs, 16 maps, 4 inputs].
int64_t group_bytes(int64_t maps) { return 3 * segments_of(maps) * 2 * kTile; }

// -- sums of 32 positions from q and 32 maps: sums[position * 32 + map] -------------------------------------------------

struct Amx {
  const Tiles tiles;

  static void sum(const Bordered<uint8_t>& in, int64_t q, const int8_t* weight, const int32_t* bias, int32_t* sums) {
    const int64_t maps = in.maps, segments = segments_of(maps);
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
    store_tiles(sums);
  }
};

struct Vnni {
  static void sum(const Bordered<uint8_t>& in, int64_t q, const int8_t* weight, const int32_t* bias, int32_t* sums) {
    for (int64_t i = 0; i < kPixels; i += kAtOnce) sum_some(in, q + i, weight, bias, sums + i * kMaps);
  }

 private:
  static constexpr int64_t kAtOnce = 8;  // positions whose sums are in registers, two each

  static void sum_some(const Bordered<uint8_t>& in, int64_t q, const int8_t* weight, const int32_t* bias,
                       int32_t* sums) {
    const int64_t maps = in.maps, padded = segments_of(maps) * kSegment;
    __m512i low[kAtOnce], high[kAtOnce];
    for (int64_t i = 0; i < kAtOnce; ++i) {
      low[i] = _mm512_loadu_si512(bias);
      high[i] = _mm512_loadu_si512(bias + 16);
    }
    for (int64_t dy = 0; dy < 3; ++dy, weight += padded * kMaps) {
      const uint8_t* pixels = in.buffer.data + (q + dy * in.pitch) * maps;
      for (int64_t k = 0; k < 3 * maps; k += 4) {
        const int8_t* four = weight + k / kSegment * 2 * kTile + k % kSegment * 16;
        const __m512i first = _mm512_load_si512(four), second = _mm512_load_si512(four + kTile);
        for (int64_t i = 0; i < kAtOnce; ++i) {
          int32_t values;
          memcpy(&values, pixels + i * maps + k, sizeof values);
          const __m512i all = _mm512_set1_epi32(values);
          low[i] = _mm512_dpbusd_epi32(low[i], all, first);
          high[i] = _mm512_dpbusd_epi32(high[i], all, second);
        }
      }
    }
    for (int64_t i = 0; i < kAtOnce; ++i) {
      _mm512_store_si512(sums + i * kMaps, low[i]);
      _mm512_store_si512(sums + i * kMaps + 16, high[i]);
    }
  }
};

// Calls `end(q, map, products)` for all groups of 32 of `rows * in.pitch` positions and of the maps, with
// scale * (bias + sum) of position i as products(i, 0) and (i, 1), 16 maps each.
template <typename With, typename End>
void convolve(const Bordered<uint8_t>& in, int64_t rows, const Layer& layer, const End& end) {
  alignas(64) int32_t sums[kPixels * kMaps];
  const int8_t* weights = layer.packed;
  for (int64_t map = 0; map < in.maps; map += kMaps, weights += group_bytes(in.maps)) {
    const __m512 scale[2] = {_mm512_loadu_ps(layer.scale + map), _mm512_loadu_ps(layer.scale + map + 16)};
    for (int64_t q = 0; q < rows * in.pitch; q += kPixels) {
      With::sum(in, q, weights, layer.bias + map, sums);
      end(q, map, [&](int64_t i, int64_t half) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + i * kMaps + 16 * half)), scale[half]);
      });
    }
  }
}

// -- to 8 bits and from 32 ------------------------------------------------------------------------------------------------

// Rounded to even, into [0, 255].
inline __m128i to_byte(__m512 values) {
  const __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(values, _mm512_set1_ps(255)));
  return _mm512_cvtepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
}

inline void store(uint8_t* to, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes); }

// Image rows first, first + 1, ... into `to`; rows outside the image are zeros.
void take(const float* image, const float* scale, int64_t first, int64_t height, const Bordered<uint8_t>& to) {
  const int64_t maps = to.maps, width = to.pitch - 2;
  to.clear_border(first, height);
  for (int64_t row = 0; row < to.rows; ++row) {
    const int64_t source = first + row;
    if (source < 0 || source >= height) continue;
    const float* from = image + source * width * maps;
    uint8_t* into = to.at(row, 1);
    for (int64_t i = 0; i < width; ++i, from += maps, into += maps)
      for (int64_t map = 0; map < maps; map += 16)
        store(into + map, to_byte(_mm512_mul_ps(_mm512_loadu_ps(from + map), _mm512_loadu_ps(scale + map))));
  }
}

template <typename With>
void forward_with(const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale,
                  const Layer& first, const Layer& second, float* out) {
  const int64_t maps = images.maps, width = images.width, pitch = width + 2, row_values = width * maps;
  const int64_t image_values = images.height * row_values;
  [[maybe_unused]] const With unit{};
  Bordered<uint8_t> x(most_rows(images) + 4, pitch, maps), h(most_rows(images) + 2, pitch, maps);
  for (int64_t strip = from; strip < to; ++strip) {
    const Rows rows = rows_of(images, strip);
    x.rows = rows.count + 4;
    h.rows = rows.count + 2;
    take(in + rows.image * image_values, in_scale, rows.first - 2, images.height, x);
    convolve<With>(x, h.rows, first, [&](int64_t q, int64_t map, const auto& products) {
      uint8_t* row = h.buffer.data + (q + 1) * maps + map;
      for (int64_t i = 0; i < kPixels; ++i) {
        store(row + i * maps, to_byte(products(i, 0)));
        store(row + i * maps + 16, to_byte(products(i, 1)));
      }
    });
    h.clear_border(rows.first - 1, images.height);
    const int64_t start = rows.image * image_values + rows.first * row_values;
    convolve<With>(h, rows.count, second, [&](int64_t q, int64_t map, const auto& products) {
      for_pixels(q, pitch, rows.count, [&](int64_t i, int64_t row, int64_t column) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t at = start + (row * width + column) * maps + map + 16 * half;
          const __m512 value = _mm512_add_ps(_mm512_loadu_ps(in + at), products(i, half));
          _mm512_storeu_ps(out + at, _mm512_max_ps(_mm512_setzero_ps(), value));
        }
      });
    });
  }
}

}  // namespace

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

void forward(Unit unit, const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale,
             const Layer& first, const Layer& second, float* out) {
  (unit == Unit::kAmx ? forward_with<Amx> : forward_with<Vnni>)(images, from, to, in, in_scale, first, second, out);
}

}  // namespace fastsimgan::int8

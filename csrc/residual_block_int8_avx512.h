// The arithmetic of residual_block_int8.h in AVX-512 but for the products, which the file that includes this has a unit for.
// It includes nothing whose inline functions could end up in other hands, and what it holds is that file's own: each is
// compiled for its unit alone.
#pragma once

#include <immintrin.h>

#include "residual_block_bordered_rows.h"
#include "residual_block_int8.h"

namespace fastsimgan::residual_block_int8 {
namespace {

using namespace residual_block_strips;  // of residual_block_bordered_rows.h

// `Unit::sum(in, q, weights, bias, sums)` gives bias + the sums of 32 positions from q and 32 maps, as
// sums[position * 32 + map].
//
// Calls `end(q, map, products)` for all groups of 32 of `rows * in.pitch` positions and of the maps, with
// scale * (bias + sum) of position i as products(i, 0) and (i, 1), 16 maps each.
template <typename Unit, typename End>
void convolve(const Bordered<uint8_t>& in, int64_t rows, const Layer& layer, const End& end) {
  alignas(64) int32_t sums[kPixels * kMaps];
  const int8_t* weights = layer.packed;
  for (int64_t map = 0; map < in.maps; map += kMaps, weights += group_bytes(in.maps)) {
    const __m512 scale[2] = {_mm512_loadu_ps(layer.scale + map), _mm512_loadu_ps(layer.scale + map + 16)};
    for (int64_t q = 0; q < rows * in.pitch; q += kPixels) {
      Unit::sum(in, q, weights, layer.bias + map, sums);
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

template <typename Unit>
void forward(const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale, const Layer& first,
             const Layer& second, float* out) {
  const int64_t maps = images.maps, width = images.width, pitch = width + 2, row_values = width * maps;
  const int64_t image_values = images.height * row_values;
  [[maybe_unused]] const Unit unit{};
  Bordered<uint8_t> x(most_rows(images) + 4, pitch, maps), h(most_rows(images) + 2, pitch, maps);
  for (int64_t strip = from; strip < to; ++strip) {
    const Rows rows = rows_of(images, strip);
    x.rows = rows.count + 4;
    h.rows = rows.count + 2;
    take(in + rows.image * image_values, in_scale, rows.first - 2, images.height, x);
    convolve<Unit>(x, h.rows, first, [&](int64_t q, int64_t map, const auto& products) {
      uint8_t* row = h.buffer.data + (q + 1) * maps + map;
      for (int64_t i = 0; i < kPixels; ++i) {
        store(row + i * maps, to_byte(products(i, 0)));
        store(row + i * maps + 16, to_byte(products(i, 1)));
      }
    });
    h.clear_border(rows.first - 1, images.height);
    const int64_t start = rows.image * image_values + rows.first * row_values;
    convolve<Unit>(h, rows.count, second, [&](int64_t q, int64_t map, const auto& products) {
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
}  // namespace fastsimgan::residual_block_int8

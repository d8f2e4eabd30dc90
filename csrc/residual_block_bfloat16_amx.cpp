// The arithmetic of residual_block_bfloat16.h on AMX, Intel's matrix unit. This file alone is compiled for AMX's bfloat16.
#include <immintrin.h>

#include "amx_tiles.h"
#include "residual_block_bfloat16.h"
#include "residual_block_bordered_rows.h"

namespace fastsimgan::residual_block_bfloat16 {
namespace {

using namespace residual_block_strips;  // of residual_block_bordered_rows.h
using amx_tiles::Tiles;

constexpr int64_t kTile = 16 * 32;  // bfloat16 values in a tile of 16 rows of 64 bytes

inline __m512i pack(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Image rows first, first + 1, ... into `to`; rows outside the image are zeros. With `out` only where that is positive.
void take_floats(const float* image, const float* out, int64_t first, int64_t height, const Bordered<bfloat16>& to) {
  const int64_t row_values = (to.pitch - 2) * to.maps;
  to.clear_border(first, height);
  for (int64_t row = 0; row < to.rows; ++row) {
    const int64_t source = first + row;
    if (source < 0 || source >= height) continue;
    const float* from = image + source * row_values;
    const float* mask = out ? out + source * row_values : nullptr;
    bfloat16* into = to.at(row, 1);
    for (int64_t i = 0; i < row_values; i += 32) {
      __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + 16);
      if (mask) {  // NaN counts as not positive
        const __m512 zero = _mm512_setzero_ps();
        low = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_loadu_ps(mask + i), zero, _CMP_GT_OQ), low);
        high = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_loadu_ps(mask + i + 16), zero, _CMP_GT_OQ), high);
      }
      _mm512_storeu_si512(into + i, pack(low, high));
    }
  }
}

void take_bfloat16(const bfloat16* image, int64_t first, int64_t height, const Bordered<bfloat16>& to) {
  const int64_t row_values = (to.pitch - 2) * to.maps;
  to.clear_border(first, height);
  for (int64_t row = 0; row < to.rows; ++row) {
    const int64_t source = first + row;
    if (source < 0 || source >= height) continue;
    memcpy(to.at(row, 1), image + source * row_values, row_values * sizeof(bfloat16));
  }
}

// -- convolution ------------------------------------------------------------------------------------------------------

// For each of the first `rows * in.pitch` positions, and each output map: the sum over all taps and
// input maps. `end(q, map, sums)` takes them for 32 positions from q and 32 maps from `map`, sums[position * 32 + map].
template <typename End>
inline void convolve(const Bordered<bfloat16>& in, int64_t rows, const bfloat16* weights, const End& end) {
  const int64_t maps = in.maps, positions = rows * in.pitch, bytes = maps * sizeof(bfloat16);
  alignas(64) float sums[kPixels * kMaps];
  amx_tiles::finish_writes();
  for (int64_t map = 0; map < maps; map += kMaps) {
    for (int64_t q = 0; q < positions; q += kPixels) {
      const bfloat16* weight = weights + map * 9 * maps;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t dy = 0; dy < 3; ++dy)
        for (int64_t dx = 0; dx < 3; ++dx) {
          const bfloat16* pixels = in.buffer.data + (q + dy * in.pitch + dx) * maps;
          for (int64_t k = 0; k < maps; k += 32, weight += 2 * kTile) {
            _tile_loadd(4, pixels + k, bytes);
            _tile_loadd(6, weight, 64);
            _tile_loadd(7, weight + kTile, 64);
            _tile_loadd(5, pixels + k + 16 * maps, bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      amx_tiles::store_sums(sums);
      end(q, map, sums);
    }
  }
}

// -- gradients of the weights -----------------------------------------------------------------------------------------

// Sixteen rows of sixteen 32-bit values, transposed.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // within each group of eight rows
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Positions of a bordered buffer map by map: [C, length].
struct Planes {
  int64_t maps, length;
  Buffer<bfloat16> buffer;
  static int64_t length_of(int64_t positions) {
    const int64_t whole = (positions + 31) / 32;  // in cache lines; an odd number, so that maps fall in all sets
    return 32 * (whole | 1);
  }
  Planes(int64_t positions, int64_t maps) : maps(maps), length(length_of(positions)), buffer(maps * length) {}

  void take(const Bordered<bfloat16>& from) const {
    const int64_t filled = from.positions_with_room() / 16 * 16;
    for (int64_t q = 0; q < length; q += 16)
      for (int64_t map = 0; map < maps; map += 32) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i)
          r[i] = q < filled ? _mm512_loadu_si512(from.buffer.data + (q + i) * maps + map) : _mm512_setzero_si512();
        transpose(r);  // r[i]: maps 2 i (low halves) and 2 i + 1 of 16 positions
        for (int i = 0; i < 16; ++i) {
          bfloat16* to = buffer.data + (map + 2 * i) * length + q;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(r[i]));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + length),
                              _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
        }
      }
  }
};

// The gradients at positions 0 to `count` from `from` on, zeros behind them, two positions side by side for each map, as
// the matrix unit takes them: [count / 2, C, 2]. Adds their sums to `sums` [C].
void interleave(const bfloat16* from, int64_t count, int64_t maps, bfloat16* to, float* sums) {
  alignas(64) static const uint16_t low_half[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(low_half), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t map = 0; map < maps; map += 32) {
    __m512 even = _mm512_setzero_ps(), odd = even;  // sums of maps 0, 2, ... and 1, 3, ...
    for (int64_t q = 0; q < (count + 31) / 32 * 32; q += 2) {
      const __m512i first = q < count ? _mm512_loadu_si512(from + q * maps + map) : _mm512_setzero_si512();
      const __m512i second = q + 1 < count ? _mm512_loadu_si512(from + (q + 1) * maps + map) : _mm512_setzero_si512();
      bfloat16* into = to + q * maps + 2 * map;
      _mm512_storeu_si512(into, _mm512_permutex2var_epi16(first, low, second));
      _mm512_storeu_si512(into + 32, _mm512_permutex2var_epi16(first, high, second));
      even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
      odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(first, upper)));
      even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
      odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(second, upper)));
    }
    alignas(64) float both[32];
    _mm512_store_ps(both, even);
    _mm512_store_ps(both + 16, odd);
    for (int i = 0; i < 16; ++i) {
      sums[map + 2 * i] += both[i];
      sums[map + 2 * i + 1] += both[16 + i];
    }
  }
}

// Adds to `sums` [3, 3, C in, C out], over all positions q, planes[in][q + dy * pitch + dx] * gradients[q][out].
void add_weight_gradient(const Planes& planes, int64_t pitch, const bfloat16* gradients, int64_t count, float* sums) {
  const int64_t maps = planes.maps, plane_bytes = planes.length * sizeof(bfloat16);
  const int64_t gradient_bytes = 2 * maps * sizeof(bfloat16), sum_bytes = maps * sizeof(float);
  amx_tiles::finish_writes();
  for (int64_t tap = 0; tap < 9; ++tap) {
    const bfloat16* shifted = planes.buffer.data + tap / 3 * pitch + tap % 3;
    for (int64_t in = 0; in < maps; in += 32)
      for (int64_t out = 0; out < maps; out += 32) {
        float* corner = sums + (tap * maps + in) * maps + out;
        _tile_loadd(0, corner, sum_bytes);
        _tile_loadd(1, corner + 16, sum_bytes);
        _tile_loadd(2, corner + 16 * maps, sum_bytes);
        _tile_loadd(3, corner + 16 * maps + 16, sum_bytes);
        for (int64_t q = 0; q < count; q += 32) {
          const bfloat16* plane = shifted + in * planes.length + q;
          const bfloat16* gradient = gradients + q * maps + 2 * out;
          _tile_loadd(4, plane, plane_bytes);
          _tile_loadd(6, gradient, gradient_bytes);
          _tile_loadd(7, gradient + 32, gradient_bytes);
          _tile_loadd(5, plane + 16 * planes.length, plane_bytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, corner, sum_bytes);
        _tile_stored(1, corner + 16, sum_bytes);
        _tile_stored(2, corner + 16 * maps, sum_bytes);
        _tile_stored(3, corner + 16 * maps + 16, sum_bytes);
      }
  }
}

}  // namespace

void pack_weights(const float* weight, const int64_t* strides, int64_t maps, bool backward, bfloat16* packed) {
  for (int64_t out = 0; out < maps; out += kMaps)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t in = 0; in < maps; in += 32)
        for (int64_t half = 0; half < 2; ++half)
          for (int64_t pair = 0; pair < 16; ++pair)
            for (int64_t column = 0; column < 16; ++column)
              for (int64_t i = 0; i < 2; ++i) {
                const int64_t from = in + 2 * pair + i, to = out + 16 * half + column;
                const int64_t turned = backward ? 8 - tap : tap;
                const float* value = weight + (backward ? from : to) * strides[0] + (backward ? to : from) * strides[1] +
                                     turned / 3 * strides[2] + turned % 3 * strides[3];
                *packed++ = static_cast<bfloat16>(
                    _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(*value)), 0));
              }
}

void forward(const Images& images, int64_t from, int64_t to, const float* in, const bfloat16* weight1,
             const float* bias1, const bfloat16* weight2, const float* bias2, bfloat16* hidden, float* out) {
  const int64_t maps = images.maps, width = images.width, pitch = width + 2, row_values = width * maps;
  const int64_t image_values = images.height * row_values;
  const Tiles tiles;
  Bordered<bfloat16> x(most_rows(images) + 4, pitch, maps), h(most_rows(images) + 2, pitch, maps);
  for (int64_t strip = from; strip < to; ++strip) {
    const Rows rows = rows_of(images, strip);
    x.rows = rows.count + 4;
    h.rows = rows.count + 2;
    const float* image = in + rows.image * image_values;
    take_floats(image, nullptr, rows.first - 2, images.height, x);
    convolve(x, h.rows, weight1, [&](int64_t q, int64_t map, const float* sums) {
      const __m512 low = _mm512_loadu_ps(bias1 + map), high = _mm512_loadu_ps(bias1 + map + 16);
      const __m512 zero = _mm512_setzero_ps();
      bfloat16* row = h.buffer.data + (q + 1) * maps + map;
      for (int64_t i = 0; i < kPixels; ++i) {  // max(zero, v) is v where v is NaN
        const __m512 first = _mm512_max_ps(zero, _mm512_add_ps(_mm512_load_ps(sums + i * kMaps), low));
        const __m512 second = _mm512_max_ps(zero, _mm512_add_ps(_mm512_load_ps(sums + i * kMaps + 16), high));
        _mm512_storeu_si512(row + i * maps, pack(first, second));
      }
    });
    h.clear_border(rows.first - 1, images.height);
    if (hidden)
      for (int64_t row = 0; row < rows.count; ++row)
        memcpy(hidden + rows.image * image_values + (rows.first + row) * row_values, h.at(row + 1, 1),
               row_values * sizeof(bfloat16));
    const int64_t start = rows.image * image_values + rows.first * row_values;
    convolve(h, rows.count, weight2, [&](int64_t q, int64_t map, const float* sums) {
      const __m512 low = _mm512_loadu_ps(bias2 + map), high = _mm512_loadu_ps(bias2 + map + 16);
      const __m512 zero = _mm512_setzero_ps();
      for_pixels(q, pitch, rows.count, [&](int64_t i, int64_t row, int64_t column) {
        const float* sum = sums + i * kMaps;
        const int64_t at = start + (row * width + column) * maps + map;
        const __m512 first = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(sum), low), _mm512_loadu_ps(in + at));
        const __m512 second =
            _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(sum + 16), high), _mm512_loadu_ps(in + at + 16));
        _mm512_storeu_ps(out + at, _mm512_max_ps(zero, first));
        _mm512_storeu_ps(out + at + 16, _mm512_max_ps(zero, second));
      });
    });
  }
}

void backward(const Images& images, int64_t from, int64_t to, const float* grad, const float* in,
              const bfloat16* hidden, const float* out, const bfloat16* weight1, const bfloat16* weight2,
              float* grad_in, Sums sums) {
  const int64_t maps = images.maps, width = images.width, pitch = width + 2, row_values = width * maps;
  const int64_t image_values = images.height * row_values;
  const Tiles tiles;
  const int64_t most = most_rows(images);
  // outer and inner: the gradients of the sums before the second and the first ReLU
  Bordered<bfloat16> outer(most + 4, pitch, maps), inner(most + 2, pitch, maps);
  Bordered<bfloat16> before(most + 2, pitch, maps);  // what a convolution was given
  const Planes planes(before.positions_with_room(), maps);
  const Buffer<bfloat16> pairs((most * pitch + 31) / 32 * 32 * maps);
  for (int64_t strip = from; strip < to; ++strip) {
    const Rows rows = rows_of(images, strip);
    const int64_t offset = rows.image * image_values, positions = rows.count * pitch;
    outer.rows = rows.count + 4;
    inner.rows = before.rows = rows.count + 2;
    take_floats(grad + offset, out + offset, rows.first - 2, images.height, outer);

    take_bfloat16(hidden + offset, rows.first - 1, images.height, before);
    convolve(outer, inner.rows, weight2, [&](int64_t q, int64_t map, const float* sum) {
      const bfloat16* mask = before.buffer.data + (q + 1) * maps + map;
      bfloat16* row = inner.buffer.data + (q + 1) * maps + map;
      for (int64_t i = 0; i < kPixels; ++i) {
        // hidden is the outcome of a ReLU: positive, as a signed 16-bit number too, or 0 (or NaN, which has no end)
        const __mmask32 positive =
            _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(mask + i * maps), _mm512_setzero_si512());
        const __m512i values = pack(_mm512_load_ps(sum + i * kMaps), _mm512_load_ps(sum + i * kMaps + 16));
        _mm512_storeu_si512(row + i * maps, _mm512_maskz_mov_epi16(positive, values));
      }
    });
    inner.clear_border(rows.first - 1, images.height);

    planes.take(before);
    interleave(outer.at(2, 1), positions, maps, pairs.data, sums.bias2);
    add_weight_gradient(planes, pitch, pairs.data, positions, sums.weight2);
    take_floats(in + offset, nullptr, rows.first - 1, images.height, before);
    planes.take(before);
    interleave(inner.at(1, 1), positions, maps, pairs.data, sums.bias1);
    add_weight_gradient(planes, pitch, pairs.data, positions, sums.weight1);

    const int64_t start = offset + rows.first * row_values;
    convolve(inner, rows.count, weight1, [&](int64_t q, int64_t map, const float* sum) {
      const __m512 zero = _mm512_setzero_ps();
      for_pixels(q, pitch, rows.count, [&](int64_t i, int64_t row, int64_t column) {
        const int64_t at = start + (row * width + column) * maps + map;
        for (int64_t half = 0; half < 32; half += 16) {
          const __mmask16 positive = _mm512_cmp_ps_mask(_mm512_loadu_ps(out + at + half), zero, _CMP_GT_OQ);
          const __m512 skip = _mm512_maskz_loadu_ps(positive, grad + at + half);
          _mm512_storeu_ps(grad_in + at + half, _mm512_add_ps(_mm512_load_ps(sum + i * kMaps + half), skip));
        }
      });
    });
  }
}

}  // namespace fastsimgan::residual_block_bfloat16

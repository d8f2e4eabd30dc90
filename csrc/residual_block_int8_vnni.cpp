// residual_block_int8.h's block by AVX-512's VNNI. This file alone is compiled for it.
#include "residual_block_int8_avx512.h"

namespace fastsimgan::residual_block_int8 {
namespace {

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

}  // namespace

void forward_vnni(const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale,
                  const Layer& first, const Layer& second, float* out) {
  forward<Vnni>(images, from, to, in, in_scale, first, second, out);
}

}  // namespace fastsimgan::residual_block_int8

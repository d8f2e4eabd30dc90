// Each intrinsic of immintrin.h as a function over arrays, so that the emulated one and the processor's own can be compared:
// this file is compiled with either. What an intrinsic takes is read at 64 bytes a call, 128 for two registers, and so on.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

alignas(64) uint8_t aligned[64];

template <typename T>
T take(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <typename T>
void give(uint8_t* to, const T& value) {
  memcpy(to, &value, sizeof value);
}

const auto f = take<__m512>;
const auto i = take<__m512i>;

}  // namespace

// NAME(in, out), `count` times, reads `takes` registers
#define PROBE(name, takes, ...)                                                                             \
  extern "C" __attribute__((visibility("default"))) int takes_##name() { return takes; }                    \
  extern "C" __attribute__((visibility("default"))) void probe_##name(const uint8_t* in, uint8_t* out, int64_t count) { \
    for (int64_t call = 0; call < count; ++call, in += 64 * takes, out += 64) {                             \
      __VA_ARGS__;                                                                                          \
    }                                                                                                       \
  }
#define GIVES(name, takes, ...) PROBE(name, takes, give(out, __VA_ARGS__))
#define FLOATS_1(name) GIVES(name, 1, name(f(in)))
#define FLOATS_2(name) GIVES(name, 2, name(f(in), f(in + 64)))
#define WHOLES_1(name) GIVES(name, 1, name(i(in)))
#define WHOLES_2(name) GIVES(name, 2, name(i(in), i(in + 64)))

FLOATS_2(_mm512_add_ps)
FLOATS_2(_mm512_mul_ps)
FLOATS_2(_mm512_max_ps)
FLOATS_2(_mm512_min_ps)
FLOATS_2(_mm512_cvtne2ps_pbh)
FLOATS_1(_mm512_cvtps_epi32)
WHOLES_2(_mm512_add_epi16)
WHOLES_2(_mm512_max_epi32)
WHOLES_2(_mm512_and_si512)
WHOLES_2(_mm512_cmpgt_epi16_mask)
WHOLES_2(_mm512_unpacklo_epi32)
WHOLES_2(_mm512_unpackhi_epi32)
WHOLES_2(_mm512_unpacklo_epi64)
WHOLES_2(_mm512_unpackhi_epi64)
WHOLES_1(_mm512_castsi512_ps)
WHOLES_1(_mm512_cvtepi32_ps)
WHOLES_1(_mm512_cvtepi32_epi16)
WHOLES_1(_mm512_cvtepi32_epi8)
GIVES(_mm512_slli_epi32, 1, _mm512_slli_epi32(i(in), 16))
GIVES(_mm512_srli_epi32, 1, _mm512_srli_epi32(i(in), 16))
GIVES(_mm512_dpbusd_epi32, 3, _mm512_dpbusd_epi32(i(in), i(in + 64), i(in + 128)))
GIVES(_mm512_permutex2var_epi16, 3, _mm512_permutex2var_epi16(i(in), i(in + 64), i(in + 128)))
GIVES(_mm512_cmp_ps_mask, 2, _mm512_cmp_ps_mask(f(in), f(in + 64), _CMP_GT_OQ))
GIVES(_mm512_maskz_mov_ps, 2, _mm512_maskz_mov_ps(take<__mmask16>(in), f(in + 64)))
GIVES(_mm512_maskz_mov_epi16, 2, _mm512_maskz_mov_epi16(take<__mmask32>(in), i(in + 64)))
GIVES(_mm512_maskz_loadu_ps, 2, _mm512_maskz_loadu_ps(take<__mmask16>(in), in + 64))
PROBE(_mm512_shuffle_i32x4, 2, {
  give(out, _mm512_shuffle_i32x4(i(in), i(in + 64), 0x88));
  // the other choice that is made, in every other call
  if (call % 2) give(out, _mm512_shuffle_i32x4(i(in), i(in + 64), 0xdd));
})
GIVES(_mm512_loadu_ps, 1, _mm512_loadu_ps(in))
GIVES(_mm512_loadu_si512, 1, _mm512_loadu_si512(in))
PROBE(_mm512_load_ps, 1, memcpy(aligned, in, 64); give(out, _mm512_load_ps(aligned)))
PROBE(_mm512_load_si512, 1, memcpy(aligned, in, 64); give(out, _mm512_load_si512(aligned)))
PROBE(_mm512_storeu_ps, 1, _mm512_storeu_ps(out, f(in)))
PROBE(_mm512_storeu_si512, 1, _mm512_storeu_si512(out, i(in)))
PROBE(_mm512_store_ps, 1, _mm512_store_ps(aligned, f(in)); memcpy(out, aligned, 64))
PROBE(_mm512_store_si512, 1, _mm512_store_si512(aligned, i(in)); memcpy(out, aligned, 64))
PROBE(_mm256_storeu_si256, 1, _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), take<__m256i>(in)))
PROBE(_mm_storeu_si128, 1, _mm_storeu_si128(reinterpret_cast<__m128i*>(out), take<__m128i>(in)))
GIVES(_mm512_setzero_ps, 1, _mm512_setzero_ps())
GIVES(_mm512_setzero_si512, 1, _mm512_setzero_si512())
GIVES(_mm512_set1_ps, 1, _mm512_set1_ps(take<float>(in)))
GIVES(_mm512_set1_epi16, 1, _mm512_set1_epi16(take<short>(in)))
GIVES(_mm512_set1_epi32, 1, _mm512_set1_epi32(take<int>(in)))
GIVES(_mm_set_ss, 1, _mm_set_ss(take<float>(in)))
GIVES(_mm_cvtneps_pbh, 1, _mm_cvtneps_pbh(take<__m128>(in)))
GIVES(_mm_extract_epi16, 1, _mm_extract_epi16(take<__m128i>(in), 0))

#ifdef AMX
// The matrix unit: a configuration, then tiles 1 and 2 and what is added to, 16 rows of 64 bytes each.
namespace {

constexpr int kTile = 16 * 64;
alignas(64) uint8_t config[64];

void load_tiles(const uint8_t* in) {
  memcpy(config, in, 64);
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(config);
  _tile_loadd(0, in + 64, 64);
  _tile_loadd(1, in + 64 + kTile, 64);
  _tile_loadd(2, in + 64 + 2 * kTile, 64);
}
void finish(uint8_t* out) {
  _tile_stored(0, out, 64);
  _tile_release();
}

}  // namespace

#define TILES(name, ...)                                                                                               \
  extern "C" __attribute__((visibility("default"))) void tiles##name(const uint8_t* in, uint8_t* out) { \
    load_tiles(in);                                                                                                    \
    __VA_ARGS__;                                                                                                       \
    finish(out);                                                                                                       \
  }
TILES(_tile_dpbf16ps, _tile_dpbf16ps(0, 1, 2))
TILES(_tile_dpbusd, _tile_dpbusd(0, 1, 2))
TILES(_tile_loadd, )
TILES(_tile_stored, _tile_stored(0, out, 64))
TILES(_tile_zero, _tile_zero(0))
TILES(_tile_loadconfig, _tile_loadconfig(config); _tile_loadd(0, in + 64 + kTile, 64))
TILES(_tile_storeconfig, _tile_storeconfig(out + kTile))
TILES(_tile_release, _tile_release(); _tile_storeconfig(out + kTile); _tile_loadconfig(config))
#endif

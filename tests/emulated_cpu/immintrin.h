// The intrinsics that csrc/residual_block_*.cpp use, in plain C++: in the place of the compiler's own header it has these
// sources compiled for any processor, with the same results to the last bit (for a NaN: a NaN). What the processor traps on
// ends the process here too, with a word about why.
//
// tests/test_emulated_cpu.py compares each with the instruction where the processor has it. A further one needs a line in
// probes.cpp.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// As in GCC's headers, so that casts between them mean the same.
using __m512 = float __attribute__((vector_size(64), may_alias));
using __m512i = long long __attribute__((vector_size(64), may_alias));
using __m512bh = short __attribute__((vector_size(64), may_alias));
using __m256i = long long __attribute__((vector_size(32), may_alias));
using __m128i = long long __attribute__((vector_size(16), may_alias));
using __m128 = float __attribute__((vector_size(16), may_alias));
using __m128bh = short __attribute__((vector_size(16), may_alias));
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

constexpr int _CMP_GT_OQ = 30;

// Touches no memory of others and is nearly all of the work: the sanitizers need not look.
#define EMULATED_UNCHECKED __attribute__((no_sanitize("address", "undefined")))

namespace emulated {

[[noreturn]] inline void trap(const char* instruction, const char* why) {
  fprintf(stderr, "emulated processor: %s: %s\n", instruction, why);
  abort();
}

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A register as T[count].
template <typename T, size_t count>
struct Lanes {
  T at[count];
  static constexpr size_t kCount = count;
  template <typename Vector>
  explicit Lanes(const Vector& vector) {
    static_assert(sizeof(Vector) == sizeof at);
    memcpy(at, &vector, sizeof at);
  }
  Lanes() = default;
  template <typename Vector>
  operator Vector() const {
    static_assert(sizeof(Vector) == sizeof at);
    Vector vector;
    memcpy(&vector, at, sizeof at);
    return vector;
  }
};
template <typename T>
using Of64 = Lanes<T, 64 / sizeof(T)>;

template <typename Vector>
inline Vector read(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}
template <typename Vector>
inline void write(void* to, const Vector& vector) {
  memcpy(to, &vector, sizeof vector);
}
inline void check_aligned(const void* address, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % 64 != 0) trap(instruction, "the address must be a multiple of 64");
}

// -- bfloat16 ---------------------------------------------------------------------------------------------------------

// VCVTNEPS2BF16: to even; denormals become zeros, NaNs quiet; whatever the rounding mode.
inline uint16_t to_bfloat16(float value) {
  const uint32_t x = bits<uint32_t>(value);
  if ((x & 0x7f800000) == 0) return x >> 16 & 0x8000;
  if ((x & 0x7fffffff) > 0x7f800000) return x >> 16 | 0x40;
  return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}

inline float flushed(float value) {
  const uint32_t x = bits<uint32_t>(value);
  return bits<float>(x & 0x7f800000 ? x : x & 0x80000000);
}

// A bfloat16 that a product takes: denormals are zeros.
inline float operand(uint16_t value) { return flushed(bits<float>(static_cast<uint32_t>(value) << 16)); }

// sum + a * b, rounded once, a result below the normal numbers flushed to zero; a and b were bfloat16.
inline float fused(float sum, float a, float b) {
  // The product is exact; rounding to double's 53 bits first changes nothing, as these are more than 2 * 24 + 2.
  const double exact = static_cast<double>(a) * b + sum;
  if (__builtin_fabs(exact) < 0x1.ffffffp-127) return __builtin_copysign(0.0, exact);
  return static_cast<float>(exact);
}

// -- AMX --------------------------------------------------------------------------------------------------------------

// A thread's tiles.
struct MatrixUnit {
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
  } config;
  struct Tile {
    uint8_t row[16][64];
  } tiles[8];

  void configure(const void* from) {
    constexpr const char* me = "ldtilecfg";
    Config next;
    memcpy(&next, from, sizeof next);
    if (next.palette > 1) trap(me, "the palette must be 0 or 1");
    if (next.palette == 0) next = {};
    for (const uint8_t byte : next.reserved)
      if (byte) trap(me, "reserved bytes must be 0");
    for (int i = 0; i < 16; ++i) {
      if (next.rows[i] > 16 || next.bytes_a_row[i] > 64) trap(me, "tiles have at most 16 rows of 64 bytes");
      if (i >= 8 && (next.rows[i] || next.bytes_a_row[i])) trap(me, "there are 8 tiles");
      if (!next.rows[i] != !next.bytes_a_row[i]) trap(me, "a tile with rows must have columns");
    }
    *this = {};
    config = next;
  }

  Tile& tile(int number, const char* instruction) {
    if (config.palette == 0) trap(instruction, "tiles must be configured first");
    if (number < 0 || number > 7 || config.rows[number] == 0) trap(instruction, "the tile is not configured");
    return tiles[number];
  }

  void load(int to, const void* base, int64_t stride) {
    Tile& tile = this->tile(to, "tileloadd");
    tile = {};
    for (int row = 0; row < config.rows[to]; ++row)
      memcpy(tile.row[row], static_cast<const uint8_t*>(base) + row * stride, config.bytes_a_row[to]);
  }
  void store(int from, void* base, int64_t stride) {
    const Tile& tile = this->tile(from, "tilestored");
    for (int row = 0; row < config.rows[from]; ++row)
      memcpy(static_cast<uint8_t*>(base) + row * stride, tile.row[row], config.bytes_a_row[from]);
  }
  void zero(int number) { tile(number, "tilezero") = {}; }

  void check_product(int to, int left, int right, const char* instruction) {
    const int all[3] = {to, left, right};
    for (const int number : all) tile(number, instruction);
    if (to == left || to == right || left == right) trap(instruction, "the three tiles must differ");
    if (config.rows[to] != config.rows[left] || config.bytes_a_row[to] != config.bytes_a_row[right] ||
        config.bytes_a_row[left] != 4 * config.rows[right] || config.bytes_a_row[right] % 4 != 0)
      trap(instruction, "the tiles' sizes do not fit");
  }

  // TDPBF16PS: products of even and of odd places are added up apart, in order, then together, then to what was there.
  // Every step rounds to even and takes and gives denormals as zeros.
  EMULATED_UNCHECKED void add_bfloat16_products(int to, int left, int right) {
    check_product(to, left, right, "tdpbf16ps");
    const int depth = config.rows[right], columns = config.bytes_a_row[right] / 4;
    float values[2][16][16] = {};  // of the right tile: even and odd places
    bool small = true;
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < columns; ++n)
        for (int i = 0; i < 2; ++i) {
          const uint16_t value = read<uint16_t>(tiles[right].row[k] + 4 * n + 2 * i);
          values[i][k][n] = operand(value);
          small &= cannot_leave_the_normal_numbers(value);
        }
    for (int m = 0; m < config.rows[to]; ++m) {
      float row[2][16];
      bool row_small = small;
      for (int k = 0; k < depth; ++k)
        for (int i = 0; i < 2; ++i) {
          const uint16_t value = read<uint16_t>(tiles[left].row[m] + 4 * k + 2 * i);
          row[i][k] = operand(value);
          row_small &= cannot_leave_the_normal_numbers(value);
        }
      float sums[2][16] = {};
      for (int i = 0; i < 2; ++i)
        for (int k = 0; k < depth; ++k)
          if (row_small)
            for (int n = 0; n < 16; ++n) sums[i][n] += row[i][k] * values[i][k][n];
          else
            for (int n = 0; n < columns; ++n) sums[i][n] = fused(sums[i][n], row[i][k], values[i][k][n]);
      for (int n = 0; n < columns; ++n) {
        uint8_t* at = tiles[to].row[m] + 4 * n;
        write(at, flushed(flushed(read<float>(at)) + flushed(sums[0][n] + sums[1][n])));
      }
    }
  }

  // Where all factors are 0 or of sizes from 2^-50 to 2^50, products are exact in float32, and sums of 32 of them multiples
  // of 2^-114 that do not overflow: plain additions do what `fused` does, at a tenth of the time.
  static bool cannot_leave_the_normal_numbers(uint16_t value) {
    const int exponent = value >> 7 & 0xff;
    return (value & 0x7fff) == 0 || (exponent >= 127 - 50 && exponent < 127 + 50);
  }

  // TDPBUSD: unsigned times signed bytes; sums wrap around.
  EMULATED_UNCHECKED void add_byte_products(int to, int left, int right) {
    check_product(to, left, right, "tdpbusd");
    const int depth = config.rows[right], columns = config.bytes_a_row[right] / 4;
    for (int m = 0; m < config.rows[to]; ++m) {
      int products[16] = {};  // at most 64 * 255 * 128
      for (int k = 0; k < depth; ++k)
        for (int n = 0; n < columns; ++n)
          for (int i = 0; i < 4; ++i)
            products[n] += tiles[left].row[m][4 * k + i] * static_cast<int8_t>(tiles[right].row[k][4 * n + i]);
      uint32_t sums[16];
      memcpy(sums, tiles[to].row[m], 4 * columns);
      for (int n = 0; n < columns; ++n) sums[n] += static_cast<uint32_t>(products[n]);
      memcpy(tiles[to].row[m], sums, 4 * columns);
    }
  }
};

inline thread_local MatrixUnit matrix_unit{};
inline thread_local int64_t matrix_products = 0;  // of this thread, for the tests

}  // namespace emulated

inline void _tile_loadconfig(const void* config) { emulated::matrix_unit.configure(config); }
inline void _tile_storeconfig(void* config) { emulated::write(config, emulated::matrix_unit.config); }
inline void _tile_release() { emulated::matrix_unit = {}; }
inline void _tile_loadd(int to, const void* base, int64_t stride) { emulated::matrix_unit.load(to, base, stride); }
inline void _tile_stored(int from, void* base, int64_t stride) { emulated::matrix_unit.store(from, base, stride); }
inline void _tile_zero(int tile) { emulated::matrix_unit.zero(tile); }
inline void _tile_dpbf16ps(int to, int left, int right) {
  ++emulated::matrix_products;
  emulated::matrix_unit.add_bfloat16_products(to, left, right);
}
inline void _tile_dpbusd(int to, int left, int right) {
  ++emulated::matrix_products;
  emulated::matrix_unit.add_byte_products(to, left, right);
}

// -- memory -----------------------------------------------------------------------------------------------------------

inline __m512 _mm512_loadu_ps(const void* from) { return emulated::read<__m512>(from); }
inline __m512i _mm512_loadu_si512(const void* from) { return emulated::read<__m512i>(from); }
inline __m512 _mm512_load_ps(const void* from) {
  emulated::check_aligned(from, "_mm512_load_ps");
  return emulated::read<__m512>(from);
}
inline __m512i _mm512_load_si512(const void* from) {
  emulated::check_aligned(from, "_mm512_load_si512");
  return emulated::read<__m512i>(from);
}
// What is masked out is not touched.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  emulated::Of64<float> result;
  for (int i = 0; i < 16; ++i)
    result.at[i] = mask >> i & 1 ? emulated::read<float>(static_cast<const float*>(from) + i) : 0.0f;
  return result;
}
inline void _mm512_storeu_ps(void* to, __m512 a) { emulated::write(to, a); }
inline void _mm512_storeu_si512(void* to, __m512i a) { emulated::write(to, a); }
inline void _mm512_store_ps(void* to, __m512 a) {
  emulated::check_aligned(to, "_mm512_store_ps");
  emulated::write(to, a);
}
inline void _mm512_store_si512(void* to, __m512i a) {
  emulated::check_aligned(to, "_mm512_store_si512");
  emulated::write(to, a);
}
inline void _mm256_storeu_si256(__m256i* to, __m256i a) { emulated::write(to, a); }
inline void _mm_storeu_si128(__m128i* to, __m128i a) { emulated::write(to, a); }

// -- the same in all lanes --------------------------------------------------------------------------------------------

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float a) { return a - __m512{}; }
inline __m512i _mm512_set1_epi16(short a) {
  emulated::Of64<short> result;
  for (short& lane : result.at) lane = a;
  return result;
}
inline __m512i _mm512_set1_epi32(int a) {
  emulated::Of64<int> result;
  for (int& lane : result.at) lane = a;
  return result;
}
inline __m128 _mm_set_ss(float a) { return __m128{a, 0.0f, 0.0f, 0.0f}; }

// -- arithmetic -------------------------------------------------------------------------------------------------------

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
// The second where the two are unordered or zeros of either sign.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
inline __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  emulated::Of64<uint16_t> result(a), other(b);
  for (int i = 0; i < 32; ++i) result.at[i] = static_cast<uint16_t>(result.at[i] + other.at[i]);
  return result;
}
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  emulated::Of64<int> result(a), other(b);
  for (int i = 0; i < 16; ++i) result.at[i] = result.at[i] > other.at[i] ? result.at[i] : other.at[i];
  return result;
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
  emulated::Of64<uint32_t> result(a);
  for (uint32_t& lane : result.at) lane = count > 31 ? 0 : lane << count;
  return result;
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
  emulated::Of64<uint32_t> result(a);
  for (uint32_t& lane : result.at) lane = count > 31 ? 0 : lane >> count;
  return result;
}
// VPDPBUSD: unsigned times signed bytes, four a lane; the sum wraps around, and nothing in between saturates.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  emulated::Of64<uint32_t> result(sum);
  const emulated::Of64<uint8_t> left(a);
  const emulated::Of64<int8_t> right(b);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j)
      result.at[i] += static_cast<uint32_t>(left.at[4 * i + j] * right.at[4 * i + j]);
  return result;
}

// -- masks ------------------------------------------------------------------------------------------------------------

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_GT_OQ) emulated::trap("_mm512_cmp_ps_mask", "this predicate is not emulated");
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i)
    if (a[i] > b[i]) mask |= 1u << i;
  return static_cast<__mmask16>(mask);
}
inline __mmask32 _mm512_cmpgt_epi16_mask(__m512i a, __m512i b) {
  const emulated::Of64<short> left(a), right(b);
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i)
    if (left.at[i] > right.at[i]) mask |= 1u << i;  // (... ? 1 : 0) << i is 0 for GCC 12 under -fsanitize=undefined
  return mask;
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
  emulated::Of64<uint32_t> result(a);
  for (int i = 0; i < 16; ++i) result.at[i] = mask >> i & 1 ? result.at[i] : 0;
  return result;
}
inline __m512i _mm512_maskz_mov_epi16(__mmask32 mask, __m512i a) {
  emulated::Of64<uint16_t> result(a);
  for (int i = 0; i < 32; ++i) result.at[i] = mask >> i & 1 ? result.at[i] : 0;
  return result;
}

// -- from type to type ------------------------------------------------------------------------------------------------

inline __m512 _mm512_castsi512_ps(__m512i a) { return emulated::bits<__m512>(a); }
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  const emulated::Of64<int> from(a);
  emulated::Of64<float> result;
  for (int i = 0; i < 16; ++i) result.at[i] = static_cast<float>(from.at[i]);
  return result;
}
// To even; what int32 does not hold, NaN too, is the smallest int32.
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  emulated::Of64<int> result;
  for (int i = 0; i < 16; ++i)
    result.at[i] = a[i] >= -0x1p31f && a[i] < 0x1p31f ? static_cast<int>(__builtin_rintf(a[i])) : INT32_MIN;
  return result;
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  const emulated::Of64<uint32_t> from(a);
  emulated::Lanes<uint16_t, 16> result;
  for (int i = 0; i < 16; ++i) result.at[i] = static_cast<uint16_t>(from.at[i]);
  return result;
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  const emulated::Of64<uint32_t> from(a);
  emulated::Lanes<uint8_t, 16> result;
  for (int i = 0; i < 16; ++i) result.at[i] = static_cast<uint8_t>(from.at[i]);
  return result;
}
// The second is the lower half.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  emulated::Of64<uint16_t> result;
  for (int i = 0; i < 16; ++i) {
    result.at[i] = emulated::to_bfloat16(b[i]);
    result.at[16 + i] = emulated::to_bfloat16(a[i]);
  }
  return result;
}
inline __m128bh _mm_cvtneps_pbh(__m128 a) {
  emulated::Lanes<uint16_t, 8> result{};
  for (int i = 0; i < 4; ++i) result.at[i] = emulated::to_bfloat16(a[i]);
  return result;
}
inline int _mm_extract_epi16(__m128i a, int lane) { return emulated::Lanes<uint16_t, 8>(a).at[lane & 7]; }

// -- from lane to lane ------------------------------------------------------------------------------------------------

inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  const emulated::Of64<uint16_t> first(a), second(b), from(index);
  emulated::Of64<uint16_t> result;
  for (int i = 0; i < 32; ++i) result.at[i] = (from.at[i] & 32 ? second : first).at[from.at[i] & 31];
  return result;
}
// 128 bits at a time: two of `a`, two of `b`.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int choice) {
  const emulated::Of64<uint32_t> first(a), second(b);
  emulated::Of64<uint32_t> result;
  for (int i = 0; i < 16; ++i)
    result.at[i] = (i < 8 ? first : second).at[4 * (choice >> (i / 4 * 2) & 3) + i % 4];
  return result;
}

namespace emulated {
// Values side by side in the lower (or upper) half of each 128 bits, from `a` and `b` in turn.
template <typename T, bool upper>
inline __m512i unpack(__m512i a, __m512i b) {
  constexpr int many = 16 / sizeof(T);
  const Of64<T> first(a), second(b);
  Of64<T> result;
  for (int block = 0; block < 64 / static_cast<int>(sizeof(T)); block += many)
    for (int i = 0; i < many; ++i)
      result.at[block + i] = (i % 2 ? second : first).at[block + i / 2 + (upper ? many / 2 : 0)];
  return result;
}
}  // namespace emulated
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emulated::unpack<uint32_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emulated::unpack<uint32_t, true>(a, b); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emulated::unpack<uint64_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emulated::unpack<uint64_t, true>(a, b); }

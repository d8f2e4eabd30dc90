// Which slot of the history goes where: shared by the CPU op, the CUDA kernel and the tests' sampler, so that all of
// them pick the same slots from the same state. The readable description is fastsimgan/ops/history_swap.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTSIMGAN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTSIMGAN_HOST_DEVICE inline
#endif

namespace fastsimgan {

// Entries of the int64 state; one entry a slot follows, the number of the swap that wrote it.
enum StateEntry : int { kSeed, kSwaps, kFill, kDrawn, kAgeSum, kTicket, kAgePartial, kHeader };

enum Stream : uint32_t { kDraw = 0, kReplace = 1 };

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 of the counter (swap, stream, block) under the key `seed`.
FASTSIMGAN_HOST_DEVICE Words philox(uint64_t seed, uint64_t swap, uint32_t stream, uint32_t block) {
  uint32_t c0 = static_cast<uint32_t>(swap), c1 = static_cast<uint32_t>(swap >> 32), c2 = stream, c3 = block;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = static_cast<uint32_t>(p1), c2 = n2, c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The keyed bijection of 0 .. domain - 1 (domain at most 2^31), and its inverse.
class Permutation {
 public:
  Permutation() = default;

  FASTSIMGAN_HOST_DEVICE Permutation(uint32_t domain, uint64_t seed, uint64_t swap, Stream stream) : domain_(domain) {
    int bits = 6;  // _MIN_BITS of the reference: smaller networks favour some pairs of slots
    while (bits < 31 && (uint32_t{1} << bits) < domain) ++bits;
    low_bits_ = bits - bits / 2;
    low_mask_ = (uint32_t{1} << low_bits_) - 1;
    high_mask_ = (uint32_t{1} << (bits / 2)) - 1;
    for (uint32_t block = 0; block < 2; ++block) {
      const Words words = philox(seed, swap, stream, block);
      for (int i = 0; i < 4; ++i) keys_[4 * block + i] = words.word[i];
    }
  }

  FASTSIMGAN_HOST_DEVICE uint32_t slot(uint32_t index) const {
    uint32_t x = index;
    do {
      uint32_t high = x >> low_bits_, low = x & low_mask_;
      for (int i = 0; i < kRounds; i += 2) {
        low ^= mix(high ^ keys_[i]) & low_mask_;
        high ^= mix(low ^ keys_[i + 1]) & high_mask_;
      }
      x = high << low_bits_ | low;
    } while (x >= domain_);
    return x;
  }

  // The index that slot() maps here: the rounds backwards, and the walk with them.
  FASTSIMGAN_HOST_DEVICE uint32_t index(uint32_t slot) const {
    uint32_t x = slot;
    do {
      uint32_t high = x >> low_bits_, low = x & low_mask_;
      for (int i = kRounds - 2; i >= 0; i -= 2) {
        high ^= mix(low ^ keys_[i + 1]) & high_mask_;
        low ^= mix(high ^ keys_[i]) & low_mask_;
      }
      x = high << low_bits_ | low;
    } while (x >= domain_);
    return x;
  }

 private:
  static constexpr int kRounds = 8;

  // Murmur3's 32-bit finaliser.
  static FASTSIMGAN_HOST_DEVICE uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
  }

  uint32_t domain_, low_mask_, high_mask_;
  int low_bits_;
  uint32_t keys_[kRounds];
};

// One image's share of a swap. `slot` is -1 where another task does the work.
struct Task {
  int64_t slot;
  int64_t fresh;  // the fresh image that `slot` receives, or -1: the slot is only read
  int64_t drawn;  // the place in the result that `slot` is drawn to, or -1: it is only written
  bool appended;  // the slot was empty: what is drawn is the fresh image itself
};

// Everything one swap does, as 2n independent tasks: no two touch the same slot or the same drawn image, so they can
// run in any order and at once. The task that writes a slot is also the one that reads it first, if it is drawn; it
// knows so because the bijection can be inverted.
class Swap {
 public:
  FASTSIMGAN_HOST_DEVICE Swap(const int64_t* state, int64_t capacity, int64_t n)
      : Swap(state[kSeed], state[kSwaps], state[kFill], capacity, n) {}

  FASTSIMGAN_HOST_DEVICE Swap(int64_t seed, int64_t swap, int64_t fill, int64_t capacity, int64_t n)
      : n_(n),
        swap_(swap),
        fill_(fill),
        appended_(n < capacity - fill ? n : capacity - fill),
        draw_(static_cast<uint32_t>(fill + appended_), seed, swap, kDraw) {
    if (appended_ < n) replace_ = Permutation(static_cast<uint32_t>(fill), seed, swap, kReplace);
  }

  // Tasks 0 .. n-1 store the fresh images (and draw what was there, where the draw asks for it); tasks n .. 2n-1 draw
  // from slots that stay as they are.
  FASTSIMGAN_HOST_DEVICE Task task(int64_t number) const {
    if (number < n_) {
      const bool appended = number < appended_;
      const int64_t slot = appended ? fill_ + number : replace_.slot(static_cast<uint32_t>(number - appended_));
      const int64_t drawn = draw_.index(static_cast<uint32_t>(slot));
      return {slot, number, drawn < n_ ? drawn : -1, appended};
    }
    const int64_t drawn = number - n_;
    const int64_t slot = draw_.slot(static_cast<uint32_t>(drawn));
    const bool written = slot >= fill_ || (appended_ < n_ && replace_.index(static_cast<uint32_t>(slot)) < n_ - appended_);
    return {written ? -1 : slot, -1, drawn, false};
  }

  FASTSIMGAN_HOST_DEVICE int64_t number() const { return swap_; }
  FASTSIMGAN_HOST_DEVICE int64_t filled() const { return fill_ + appended_; }

 private:
  int64_t n_, swap_, fill_, appended_;
  Permutation draw_, replace_;
};

enum class Dtype { kUint8, kFloat16, kBfloat16, kFloat32 };

// Enqueues the swap on `stream` (a cudaStream_t) as one kernel; arguments as in the Python op, all on one device.
// Returns null, or what CUDA said.
const char* history_swap_cuda(void* storage, Dtype stored, int64_t* state, const void* fresh, void* drawn, Dtype image,
                              int64_t capacity, int64_t image_numel, int64_t n, void* stream);

}  // namespace fastsimgan

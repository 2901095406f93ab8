// TopK for x86-64-v3 (AVX2, BMI2). CMakeLists.txt sets this file's compiler flags.
#include <immintrin.h>

#include "topk/kernel.h"

namespace scalpel {
namespace {

// AVX2 has no compress instruction, so this table lists, for each set of eight lanes, the lanes that move to
// the front.
struct Fronts {
  alignas(64) std::uint8_t lanes[256][8];
  constexpr Fronts() : lanes() {
    for (int set = 0; set < 256; ++set) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (set >> lane & 1) lanes[set][n++] = static_cast<std::uint8_t>(lane);
      }
    }
  }
};
constexpr Fronts kFronts;

inline __m128i front_bytes(unsigned set) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFronts.lanes[set & 255]));
}

template <class Bits>
struct Lanes;

// A mask is a vector whose selected lanes are all ones. L supplies what depends on the width of a lane.
template <class L, class Bits_, class Key_>
struct AnyLanes {
  using Bits = Bits_;
  using Key = Key_;
  using Vec = __m256i;
  using Mask = __m256i;
  static constexpr int kLanes = 32 / sizeof(Bits);
  static constexpr Bits kSign = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 1));
  static constexpr Key kLowest = static_cast<Key>(kSign);

  static Vec load(const Bits* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store(Bits* to, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  static void stream(Bits* to, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v); }
  static void finish_streams() { _mm_sfence(); }
  static Vec load_first(const Bits* from, int n) {
    alignas(32) Bits part[kLanes] = {};
    for (int i = 0; i < n; ++i) part[i] = from[i];
    return load(part);
  }
  static void store_first(int n, Bits* to, Vec v) {
    alignas(32) Bits part[kLanes];
    store(part, v);
    for (int i = 0; i < n; ++i) to[i] = part[i];
  }
  static Vec magnitude(Vec v) { return _mm256_and_si256(v, L::splat(static_cast<Key>(~kSign))); }
  static Vec negate(Mask m, Vec v) { return L::sub(_mm256_xor_si256(v, m), m); }
  static Vec min(Vec a, Vec b) { return _mm256_blendv_epi8(a, b, L::gt(a, b)); }
  static Vec max(Vec a, Vec b) { return _mm256_blendv_epi8(b, a, L::gt(a, b)); }
  static Vec choose(Mask m, Vec a, Vec b) { return _mm256_blendv_epi8(b, a, m); }
  static Mask ge(Vec a, Vec b) { return _mm256_xor_si256(L::gt(b, a), _mm256_set1_epi8(-1)); }
  static Mask negative(Vec v) { return L::gt(_mm256_setzero_si256(), v); }
  static Mask and_not(Mask a, Mask b) { return _mm256_andnot_si256(a, b); }
  static Mask either(Mask a, Mask b) { return _mm256_or_si256(a, b); }
  static Vec keep(Mask m, Vec v) { return _mm256_and_si256(m, v); }
  static Vec only_first(int n, Vec v) {
    const Mask first = L::gt(L::splat(static_cast<Key>(n)), load(L::kIota));
    return _mm256_blendv_epi8(L::splat(kLowest), v, first);
  }
  static int count(Mask m) { return __builtin_popcount(L::bits(m)); }
  static std::uint64_t places(Mask m) { return L::bits(m); }
  static Mask lowest_set(Mask m, std::int64_t n) {
    const unsigned set = _pdep_u32(static_cast<unsigned>((std::uint64_t(1) << n) - 1), L::bits(m));
    alignas(32) Bits part[kLanes];
    for (int i = 0; i < kLanes; ++i) part[i] = static_cast<Bits>(-static_cast<Key>(set >> i & 1));
    return load(part);
  }
  static void store_flags_first(int n, std::uint8_t* to, Mask m) {
    const unsigned set = L::bits(m);
    for (int i = 0; i < n; ++i) to[i] = set >> i & 1;
  }
};

template <>
struct Lanes<std::uint32_t> : AnyLanes<Lanes<std::uint32_t>, std::uint32_t, std::int32_t> {
  alignas(32) static constexpr Bits kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};

  static Vec splat(Key key) { return _mm256_set1_epi32(key); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  static Mask gt(Vec a, Vec b) { return _mm256_cmpgt_epi32(a, b); }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
  static int compress(Key* to, Vec v, Mask m) {
    const unsigned set = bits(m);
    const __m256i order = _mm256_cvtepu8_epi32(front_bytes(set));
    store(reinterpret_cast<Bits*>(to), _mm256_permutevar8x32_epi32(v, order));
    return __builtin_popcount(set);
  }
  static __m128i flags(Mask m) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    return _mm_and_si128(_mm_packs_epi16(halves, halves), _mm_set1_epi8(1));
  }
  static void store_flags(std::uint8_t* to, Mask m) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), flags(m));
  }
  static void stream_flags(std::uint8_t* to, Mask m) {
    _mm_stream_si64(reinterpret_cast<long long*>(to), _mm_cvtsi128_si64(flags(m)));
  }
};

template <>
struct Lanes<std::uint64_t> : AnyLanes<Lanes<std::uint64_t>, std::uint64_t, std::int64_t> {
  alignas(32) static constexpr Bits kIota[kLanes] = {0, 1, 2, 3};

  static Vec splat(Key key) { return _mm256_set1_epi64x(key); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_epi64(a, b); }
  static Mask gt(Vec a, Vec b) { return _mm256_cmpgt_epi64(a, b); }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(m))); }
  static int compress(Key* to, Vec v, Mask m) {
    const unsigned set = bits(m);
    // A 64-bit lane i consists of the 32-bit lanes 2 i and 2 i + 1.
    const __m256i even = _mm256_slli_epi64(_mm256_cvtepu8_epi64(front_bytes(set)), 1);
    const __m256i odd = _mm256_slli_epi64(_mm256_add_epi64(even, _mm256_set1_epi64x(1)), 32);
    store(reinterpret_cast<Bits*>(to), _mm256_permutevar8x32_epi32(v, _mm256_or_si256(even, odd)));
    return __builtin_popcount(set);
  }
  static std::uint32_t flags(Mask m) { return _pdep_u32(bits(m), 0x01010101); }
  static void store_flags(std::uint8_t* to, Mask m) {
    const std::uint32_t four = flags(m);
    __builtin_memcpy(to, &four, 4);
  }
  static void stream_flags(std::uint8_t* to, Mask m) {
    _mm_stream_si32(reinterpret_cast<int*>(to), static_cast<int>(flags(m)));
  }
};

template <>
struct Lanes<std::uint16_t> : AnyLanes<Lanes<std::uint16_t>, std::uint16_t, std::int16_t> {
  alignas(32) static constexpr Bits kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  static Vec splat(Key key) { return _mm256_set1_epi16(key); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_epi16(a, b); }
  static Mask gt(Vec a, Vec b) { return _mm256_cmpgt_epi16(a, b); }
  static __m128i bytes(Mask m) {
    return _mm_packs_epi16(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm_movemask_epi8(bytes(m))); }
  static int compress(Key* to, Vec v, Mask m) {
    const unsigned set = bits(m);
    const auto half = [to](int at, __m128i part, unsigned lanes) {
      // A 16-bit lane i consists of the bytes 2 i and 2 i + 1.
      const __m128i even = _mm_slli_epi16(_mm_cvtepu8_epi16(front_bytes(lanes)), 1);
      const __m128i odd = _mm_slli_epi16(_mm_add_epi16(even, _mm_set1_epi16(1)), 8);
      const __m128i packed = _mm_shuffle_epi8(part, _mm_or_si128(even, odd));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at), packed);
      return at + __builtin_popcount(lanes);
    };
    const int n = half(0, _mm256_castsi256_si128(v), set & 255);
    return half(n, _mm256_extracti128_si256(v, 1), set >> 8);
  }
  static __m128i flags(Mask m) { return _mm_and_si128(bytes(m), _mm_set1_epi8(1)); }
  static void store_flags(std::uint8_t* to, Mask m) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), flags(m));
  }
  static void stream_flags(std::uint8_t* to, Mask m) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), flags(m));
  }
};

#include "topk/kernel_body.inc"

}  // namespace

const TopKKernels& topk_avx2() { return kKernels; }

}  // namespace scalpel

// TopK for the architecture's baseline instruction set: the vectors of kernel_body.inc with a single lane.
// The compiler vectorises the loops that it can.
#include "topk/kernel.h"

namespace scalpel {
namespace {

template <class Bits_>
struct Lanes;
template <class Bits_, class Key_>
struct OneLane {
  using Bits = Bits_;
  using Key = Key_;
  using Vec = Key;
  using Mask = bool;
  static constexpr int kLanes = 1;
  static constexpr Bits kSign = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 1));
  static constexpr Key kLowest = static_cast<Key>(kSign);

  static Vec load(const Bits* from) { return static_cast<Key>(*from); }
  static Vec load_first(const Bits* from, int n) { return n > 0 ? load(from) : Key(0); }
  static void store(Bits* to, Vec v) { *to = static_cast<Bits>(v); }
  static void stream(Bits* to, Vec v) { store(to, v); }
  static void finish_streams() {}
  static void store_first(int n, Bits* to, Vec v) {
    if (n > 0) store(to, v);
  }
  static Vec splat(Key key) { return key; }
  static Vec magnitude(Vec v) { return static_cast<Key>(static_cast<Bits>(v) & static_cast<Bits>(~kSign)); }
  static Vec negate(Mask m, Vec v) { return m ? static_cast<Key>(-v) : v; }
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static Vec max(Vec a, Vec b) { return a < b ? b : a; }
  static Vec choose(Mask m, Vec a, Vec b) { return m ? a : b; }
  static Mask ge(Vec a, Vec b) { return a >= b; }
  static Mask negative(Vec v) { return v < 0; }
  static Mask and_not(Mask a, Mask b) { return !a & b; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static Vec only_first(int n, Vec v) { return n > 0 ? v : kLowest; }
  static Vec keep(Mask m, Vec v) { return m ? v : Key(0); }
  static int count(Mask m) { return m; }
  static std::uint64_t places(Mask m) { return m; }
  static Mask lowest_set(Mask m, std::int64_t n) { return m & (n > 0); }
  static int compress(Key* to, Vec v, Mask m) {
    *to = v;
    return m;
  }
  static void store_flags(std::uint8_t* to, Mask m) { *to = m; }
  static void stream_flags(std::uint8_t* to, Mask m) { *to = m; }
  static void store_flags_first(int n, std::uint8_t* to, Mask m) {
    if (n > 0) *to = m;
  }
};

template <>
struct Lanes<std::uint16_t> : OneLane<std::uint16_t, std::int16_t> {};
template <>
struct Lanes<std::uint32_t> : OneLane<std::uint32_t, std::int32_t> {};
template <>
struct Lanes<std::uint64_t> : OneLane<std::uint64_t, std::int64_t> {};

#include "topk/kernel_body.inc"

}  // namespace

const TopKKernels& topk_portable() { return kKernels; }

}  // namespace scalpel

// Rows of floats that are hard for a selection, as bit patterns of a float format.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "core/tensor_view.h"

namespace fuzz {

// The random numbers of one input. They depend only on the seed and the input's number, so that an input can
// be drawn again without the ones before it.
class Rng {
 public:
  Rng(std::uint64_t seed, std::int64_t number) {
    std::seed_seq words{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                        static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(number >> 32)};
    engine_.seed(words);
  }
  std::uint64_t bits() { return engine_(); }
  // In [low, high].
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  double uniform(double low, double high) { return low + (high - low) * std::ldexp(bits() >> 11, -53); }
  double normal() { return normal_(engine_); }
  double sign() { return one_in(2) ? -1.0 : 1.0; }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[between(0, static_cast<std::int64_t>(from.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

struct Format {
  scalpel::DType dtype;
  int exponent_bits;
  int mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  std::uint64_t sign() const { return std::uint64_t(1) << (exponent_bits + mantissa_bits); }
  std::uint64_t hidden() const { return std::uint64_t(1) << mantissa_bits; }
  std::uint64_t infinity() const { return ((std::uint64_t(1) << exponent_bits) - 1) << mantissa_bits; }
  double smallest() const { return std::ldexp(1.0, 1 - bias() - mantissa_bits); }  // the smallest denormal
  double smallest_normal() const { return std::ldexp(1.0, 1 - bias()); }
  double largest() const { return std::ldexp(2.0 - std::ldexp(1.0, -mantissa_bits), bias()); }
};

inline constexpr Format kFormats[] = {{scalpel::DType::kFloat16, 5, 10},
                                      {scalpel::DType::kBFloat16, 8, 7},
                                      {scalpel::DType::kFloat32, 8, 23},
                                      {scalpel::DType::kFloat64, 11, 52}};

// The number that a bit pattern represents. A double holds all of them.
inline double decode(const Format& f, std::uint64_t bits) {
  if (f.dtype == scalpel::DType::kFloat64) return std::bit_cast<double>(bits);
  if (f.dtype == scalpel::DType::kFloat32) return std::bit_cast<float>(static_cast<std::uint32_t>(bits));
  const std::uint64_t fraction = bits & (f.hidden() - 1);
  const int exponent = static_cast<int>((bits & f.infinity()) >> f.mantissa_bits);
  double size = std::numeric_limits<double>::infinity();
  if ((bits & f.infinity()) != f.infinity()) {
    const std::uint64_t whole = exponent == 0 ? fraction : fraction + f.hidden();
    size = std::ldexp(static_cast<double>(whole), std::max(exponent, 1) - f.bias() - f.mantissa_bits);
  } else if (fraction != 0) {
    size = std::numeric_limits<double>::quiet_NaN();
  }
  return (bits & f.sign()) != 0 ? -size : size;
}

// The bit pattern nearest to a number; for a NaN, a random one among its patterns.
inline std::uint64_t encode(Rng& rng, const Format& f, double value) {
  const std::uint64_t sign = std::signbit(value) ? f.sign() : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) {
    const std::uint64_t payload = rng.bits() & (f.hidden() - 1);
    return (rng.bits() & f.sign()) | f.infinity() | std::max<std::uint64_t>(payload, 1);
  }
  if (std::isinf(value)) return sign | f.infinity();
  const int least = 1 - f.bias();
  const int exponent = size == 0 ? least : std::max(std::ilogb(size), least);
  const auto whole = static_cast<std::uint64_t>(std::nearbyint(std::ldexp(size, f.mantissa_bits - exponent)));
  // If rounding up gives a `whole` of 2 * hidden(), it carries into the exponent, which is correct.
  const std::uint64_t bits = (static_cast<std::uint64_t>(exponent - least) << f.mantissa_bits) + whole;
  return sign | std::min(bits, f.infinity());
}

// The kinds up to kEverything are those of hard_rows in tests/support/tables/cases.py.
enum class Kind : std::uint8_t {
  kNormal,
  kAllEqual,
  kAllZero,
  kSignedZeros,
  kSignedZerosAndTiny,
  kDenormals,
  kLargestAndSmallest,
  kTwoValues,
  kSameSizeBothSigns,
  kAscending,
  kDescending,
  kOneOutlier,
  kRepeatedThreshold,
  kNan,
  kAllNan,
  kInfinities,
  kEverything,
  kUniform,     // all of one sign
  kFewLevels,   // a few values of both signs
  kRamp,        // a geometric series over most of the exponents
  kRaw,         // every bit pattern with equal probability
  kNeighbours,  // consecutive bit patterns, at the ends of the range or anywhere
  kPeriodic,    // another kind, repeated
  kBlocks,      // another kind, each value several times in a row
};
inline constexpr auto kLastKind = Kind::kBlocks;
inline constexpr auto kLastPlainKind = Kind::kNeighbours;

inline Kind any_kind(Rng& rng, Kind last) {
  // The kernels' guesses are tuned to continuous data, so it appears more often.
  if (rng.one_in(4)) return Kind::kNormal;
  return static_cast<Kind>(rng.between(0, static_cast<std::int64_t>(last)));
}

inline double any_scale(Rng& rng, const Format& f) {
  return std::pow(10.0, f.exponent_bits < 8 ? rng.uniform(-7, 4) : rng.uniform(-30, 30));
}

// What the elements of one row have in common.
struct RowTraits {
  std::int64_t levels;
  double span;  // the span of a ramp, in powers of 2
  std::uint64_t base, neighbours;
};

inline RowTraits draw_traits(Rng& rng, const Format& f) {
  RowTraits traits;
  traits.levels = rng.between(1, 8);
  traits.span = rng.uniform(0.1, 1.8 * f.bias());
  traits.base = rng.pick({std::uint64_t(0), f.infinity() - 2, f.sign() - 2, f.sign(), rng.bits()});
  traits.neighbours = static_cast<std::uint64_t>(rng.pick({2, 3, 5, 40, 400, 5000}));
  return traits;
}

inline double value_of(Rng& rng, const Format& f, Kind kind, const RowTraits& traits, std::int64_t i,
                       std::int64_t n) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();
  const double tiny = f.smallest();
  switch (kind) {
    case Kind::kAllEqual:
      return 1.5;
    case Kind::kAllZero:
      return 0.0;
    case Kind::kSignedZeros:
      return rng.pick({0.0, -0.0});
    case Kind::kSignedZerosAndTiny:
      return rng.pick({0.0, -0.0, tiny, -tiny});
    case Kind::kDenormals:
      return rng.sign() * tiny * static_cast<double>(rng.between(1, 8));
    case Kind::kLargestAndSmallest:
      return rng.pick({f.largest(), -f.largest(), tiny, -tiny, f.smallest_normal()});
    case Kind::kTwoValues:
      return rng.pick({1.0, -2.0});
    case Kind::kSameSizeBothSigns:
      return rng.sign() * 3.0;
    case Kind::kAscending:
      return static_cast<double>(i);
    case Kind::kDescending:
      return -static_cast<double>(i);
    case Kind::kOneOutlier:
      return i == n / 2 ? 1e4 : rng.normal() * 1e-3;
    case Kind::kRepeatedThreshold:
      return i % 3 == 0 ? 0.5 : rng.normal();
    case Kind::kNan:
      return i % 5 == 2 ? kNotANumber : rng.normal();
    case Kind::kAllNan:
      return kNotANumber;
    case Kind::kInfinities:
      return rng.pick({kInf, -kInf, 0.0, 1.0});
    case Kind::kEverything:
      return rng.pick({kNotANumber, kInf, -kInf, 0.0, -0.0, 1.0, -1.0, tiny});
    case Kind::kUniform:
      return rng.uniform(0, 1);
    case Kind::kFewLevels:
      return static_cast<double>(rng.between(-traits.levels, traits.levels));
    case Kind::kRamp:
      return rng.sign() * std::exp2(traits.span * (static_cast<double>(i) / static_cast<double>(n) - 0.5));
    default:
      return rng.normal();
  }
}

inline std::vector<std::uint64_t> draw_row(Rng& rng, const Format& f, Kind kind, double scale,
                                           std::int64_t n) {
  std::vector<std::uint64_t> row(static_cast<std::size_t>(n));
  const std::uint64_t all = 2 * f.sign() - 1;
  const RowTraits traits = draw_traits(rng, f);
  if (kind == Kind::kPeriodic || kind == Kind::kBlocks) {
    const std::int64_t length = rng.between(1, 70);
    const std::int64_t distinct = kind == Kind::kPeriodic ? length : n / length + 1;
    const auto base = draw_row(rng, f, any_kind(rng, kLastPlainKind), scale, distinct);
    for (std::int64_t i = 0; i < n; ++i) row[i] = base[kind == Kind::kPeriodic ? i % length : i / length];
    return row;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    if (kind == Kind::kRaw) {
      row[i] = rng.bits() & all;
    } else if (kind == Kind::kNeighbours) {
      row[i] = (traits.base + rng.bits() % traits.neighbours) & all;
    } else {
      row[i] = encode(rng, f, scale * value_of(rng, f, kind, traits, i, n));
    }
  }
  return row;
}

// All rows of one call. A kernel may guess the cut of a row from the rows before it, so what matters here is
// how one row follows another.
inline std::vector<std::vector<std::uint64_t>> draw_rows(Rng& rng, const Format& f, std::int64_t rows,
                                                         std::int64_t width) {
  enum class Plan { kAlike, kEachItsOwn, kNowAndThenAnother, kDrift, kAlmostCopies };
  const auto plan = static_cast<Plan>(rng.between(0, static_cast<int>(Plan::kAlmostCopies)));
  const Kind usual = any_kind(rng, kLastKind);
  const Kind other = any_kind(rng, kLastKind);
  const double step = rng.pick({0.003, 0.05, 0.5, 4.0});
  double scale = rng.one_in(3) ? any_scale(rng, f) : 1.0;
  std::vector<std::vector<std::uint64_t>> drawn;
  for (std::int64_t r = 0; r < rows; ++r) {
    if (plan == Plan::kAlmostCopies && r > 0 && !rng.one_in(20)) {
      drawn.push_back(drawn.back());
      const std::int64_t changes = width == 0 ? 0 : rng.between(0, 3);
      for (std::int64_t c = 0; c < changes; ++c) {
        drawn.back()[rng.between(0, width - 1)] = draw_row(rng, f, usual, scale, 1)[0];
      }
      continue;
    }
    Kind kind = usual;
    if (plan == Plan::kEachItsOwn) {
      kind = any_kind(rng, kLastKind);
      scale = rng.one_in(2) ? any_scale(rng, f) : 1.0;
    }
    if (plan == Plan::kNowAndThenAnother && rng.one_in(5)) kind = other;
    if (plan == Plan::kDrift) scale *= std::exp2(step * rng.normal());
    drawn.push_back(draw_row(rng, f, kind, scale, width));
  }
  return drawn;
}

}  // namespace fuzz

// Attention on lanes: checks, and one task for each head of each row of the batch.
#include <vector>

#include "jvp/jvp.h"
#include "jvp/task.h"

namespace scalpel {
namespace jvp {
namespace {

struct Sizes {
  std::int64_t batch, length, d, width, kv_width;
  DType dtype;
};

Sizes check_primal(const Attention& at) {
  const DType dtype = real_of(at.q, "q");
  if (at.q.ndim != 3) {
    refuse("q has shape " + text_of(at.q.shape, at.q.ndim) + "; it must be (batch, length, heads * d)");
  }
  const std::int64_t batch = at.q.shape[0];
  const std::int64_t length = at.q.shape[1];
  const std::int64_t width = at.q.shape[2];
  if (at.heads < 1 || at.kv_heads < 1 || at.heads % at.kv_heads != 0 || width % at.heads != 0) {
    refuse("a width of " + std::to_string(width) + " does not divide into " + std::to_string(at.heads) +
           " heads that share " + std::to_string(at.kv_heads) + " heads of k and v");
  }
  const std::int64_t d = width / at.heads;
  const std::int64_t kv_width = d * at.kv_heads;
  if (d > 65535) refuse("a head of " + std::to_string(d) + " channels; at most 65535 are allowed");
  expect(at.q, "q", dtype, {batch, length, width});
  expect(at.k, "k", dtype, {batch, length, kv_width});
  expect(at.v, "v", dtype, {batch, length, kv_width});
  expect(at.y, "y", dtype, {batch, length, width});
  const std::int64_t masks = at.allowed.ndim == 3 && at.allowed.shape[0] == 1 ? 1 : batch;
  expect(at.allowed, "allowed", DType::kBool, {masks, length, length});
  if (!absent(at.sink)) expect(at.sink, "sink", dtype, {at.heads});
  return {batch, length, d, width, kv_width, dtype};
}

void check_lanes(const LanesOf& of, const char* name, const Sizes& sizes, std::int64_t channels) {
  if (absent(of.lanes)) return;
  expect_tokens(expect_lanes(of.lanes, of.index, name, sizes.dtype, channels), sizes.batch * sizes.length,
                name);
}

// Where each head's entries are, (tokens, heads). An index must ascend within a token.
template <class Real>
std::vector<HeadEntries<Real>> entries_of(const LanesOf& of, const char* name, std::int64_t tokens,
                                          std::int64_t heads, std::int64_t d) {
  std::vector<HeadEntries<Real>> found(static_cast<std::size_t>(tokens * heads), {nullptr, nullptr, 0, 0});
  if (absent(of.lanes)) return found;
  const std::int64_t entries = of.lanes.shape[1];
  for (std::int64_t n = 0; n < tokens; ++n) {
    const std::int64_t* const channels =
        absent(of.index) ? nullptr : data<const std::int64_t>(of.index) + n * entries;
    Real* const lanes = data<Real>(of.lanes) + n * entries * kTangentLanes;
    std::int64_t e = 0;
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t begin = e;
      if (absent(of.index)) {
        e += d;
      } else {
        for (; e < entries && channels[e] < (h + 1) * d; ++e) {
          if (e > 0 && channels[e] <= channels[e - 1]) {
            refuse(std::string("the index of ") + name + " must ascend within a token");
          }
        }
      }
      found[static_cast<std::size_t>(n * heads + h)] = {
          lanes + begin * kTangentLanes, channels == nullptr ? nullptr : channels + begin, h * d, e - begin};
    }
    if (e != entries) refuse(std::string("the index of ") + name + " must ascend within a token");
  }
  return found;
}

// The same with a head's tokens side by side, as a task wants them: (batch, heads, length).
template <class Real>
std::vector<HeadEntries<Real>> by_head(const std::vector<HeadEntries<Real>>& entries, const Sizes& sizes,
                                       std::int64_t heads) {
  std::vector<HeadEntries<Real>> turned(entries.size());
  for (std::int64_t b = 0; b < sizes.batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < sizes.length; ++i) {
        turned[static_cast<std::size_t>((b * heads + h) * sizes.length + i)] =
            entries[static_cast<std::size_t>((b * sizes.length + i) * heads + h)];
      }
    }
  }
  return turned;
}

void clear(const LanesOf& of) {
  if (absent(of.lanes)) return;
  const std::int64_t elements = of.lanes.shape[0] * of.lanes.shape[1] * of.lanes.shape[2];
  std::memset(of.lanes.data, 0, static_cast<std::size_t>(elements * item_size(of.lanes.dtype)));
}

// forward: the jvp. Heads of q that share k and v are one piece of work backward, because they add up there.
void run(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v, const TensorView& y,
         int threads, bool forward) {
  const Sizes sizes = check_primal(at);
  const std::int64_t tokens = sizes.batch * sizes.length;
  check_lanes(q, "q's lanes", sizes, sizes.width);
  check_lanes(k, "k's lanes", sizes, sizes.kv_width);
  check_lanes(v, "v's lanes", sizes, sizes.kv_width);
  expect_tokens(expect_lanes(y, TensorView{.ndim = 0}, "y's lanes", sizes.dtype, sizes.width), tokens,
                "y's lanes");
  if (tokens == 0) return;
  const std::int64_t group = at.heads / at.kv_heads;
  for_dtype(sizes.dtype, [&](auto real) {
    using Real = decltype(real);
    const auto dq = by_head(entries_of<Real>(q, "q's lanes", tokens, at.heads, sizes.d), sizes, at.heads);
    const auto dk =
        by_head(entries_of<Real>(k, "k's lanes", tokens, at.kv_heads, sizes.d), sizes, at.kv_heads);
    const auto dv =
        by_head(entries_of<Real>(v, "v's lanes", tokens, at.kv_heads, sizes.d), sizes, at.kv_heads);
    if (!forward) {
      clear(k);
      clear(v);
    }
    const std::int64_t pieces = sizes.batch * at.kv_heads;
    threads = threads_of(pieces, group * sizes.length * sizes.length * sizes.d, threads);
    const PerThread<Real> scratch(threads, attention_scratch(sizes.length, sizes.d));
    const PerThread<std::uint16_t> nonzero(threads, attention_nonzero(sizes.length, sizes.d));
    auto body = [&](std::int64_t begin, std::int64_t end, int thread) {
      for (std::int64_t piece = begin; piece < end; ++piece) {
        const std::int64_t b = piece / at.kv_heads;
        const std::int64_t kv_head = piece % at.kv_heads;
        for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          const std::int64_t of_q = b * sizes.length * sizes.width + h * sizes.d;
          const std::int64_t of_kv = b * sizes.length * sizes.kv_width + kv_head * sizes.d;
          AttentionTask<Real> task;
          task.q = data<const Real>(at.q) + of_q;
          task.k = data<const Real>(at.k) + of_kv;
          task.v = data<const Real>(at.v) + of_kv;
          task.y = data<const Real>(at.y) + of_q;
          task.q_row = sizes.width;
          task.kv_row = sizes.kv_width;
          task.length = sizes.length;
          task.d = sizes.d;
          task.allowed = data<const std::uint8_t>(at.allowed) +
                         (at.allowed.shape[0] == 1 ? 0 : b * sizes.length * sizes.length);
          task.sink = absent(at.sink) ? nullptr : data<const Real>(at.sink) + h;
          task.scale = static_cast<Real>(at.scale);
          task.dq = dq.data() + (b * at.heads + h) * sizes.length;
          task.dk = dk.data() + (b * at.kv_heads + kv_head) * sizes.length;
          task.dv = dv.data() + (b * at.kv_heads + kv_head) * sizes.length;
          task.dy = data<Real>(y) + of_q * kTangentLanes;
          task.y_row = sizes.width;
          task.begin = 0;
          task.end = sizes.length;
          task.scratch = scratch.of(thread);
          task.nonzero = nonzero.of(thread);
          (forward ? kernels<Real>().attention_jvp : kernels<Real>().attention_vjp)(task);
        }
      }
    };
    parallel_for(pieces, 1, threads, body);
  });
}

}  // namespace
}  // namespace jvp

void attention_jvp(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v,
                   const TensorView& y, int threads) {
  jvp::run(at, q, k, v, y, threads, true);
}

void attention_vjp(const Attention& at, const TensorView& y, const LanesOf& q, const LanesOf& k,
                   const LanesOf& v, int threads) {
  jvp::run(at, q, k, v, y, threads, false);
}

}  // namespace scalpel

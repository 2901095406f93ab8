// Attention on lanes: the checks, and one task for each head of each batch row. Heads that share k and v
// belong to one piece of work, so that the pieces need no synchronisation.
#include <vector>

#include "jvp/attention_checks.h"
#include "jvp/jvp.h"
#include "jvp/task.h"

namespace scalpel {
namespace jvp {
namespace {

using Sizes = AttentionSizes;

// The entries of each head, (tokens, heads). An index must ascend within a token.
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

// The same entries ordered by head, (batch, heads, length), as a task expects them.
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

// Runs the jvp if `forward`, else the vjp. In the vjp, heads of q that share k and v add to the same
// cotangents.
void run(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v, const TensorView& y,
         int threads, bool forward) {
  const Sizes sizes = check_attention(at, q, k, v, y, Contents::kChecked);
  const std::int64_t tokens = sizes.tokens();
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

// The argument checks of attention, shared by the CPU and the GPU.
#pragma once

#include <string>

#include "jvp/task.h"

namespace scalpel::jvp {

struct AttentionSizes {
  std::int64_t batch, length, d, width, kv_width;
  DType dtype;
  std::int64_t tokens() const { return batch * length; }
};

inline AttentionSizes check_attention_primal(const Attention& at) {
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

inline AttentionSizes check_attention(const Attention& at, const LanesOf& q, const LanesOf& k,
                                      const LanesOf& v, const TensorView& y, Contents contents) {
  const AttentionSizes sizes = check_attention_primal(at);
  const auto check = [&](const LanesOf& of, const char* name, std::int64_t channels) {
    expect_tokens(expect_lanes(of.lanes, of.index, name, sizes.dtype, channels, contents), sizes.tokens(),
                  name);
  };
  if (!absent(q.lanes)) check(q, "q's lanes", sizes.width);
  if (!absent(k.lanes)) check(k, "k's lanes", sizes.kv_width);
  if (!absent(v.lanes)) check(v, "v's lanes", sizes.kv_width);
  check({y, TensorView{.ndim = 0}}, "y's lanes", sizes.width);
  return sizes;
}

}  // namespace scalpel::jvp

"""A second, slow implementation of CircuitGPT in float64, written only from the documented facts of the model.

It handles one token and one head at a time and shares no code with the library: weights come as a state dict, masks are
made by sorting, and sums by loops.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def forward(config: dict[str, Any], weights: dict[str, Vector], ids: list[int]) -> tuple[Vector, dict[str, Vector]]:
    """The logits (L, vocab) of one prompt, and the values (L, width) of every hook."""
    hooks: dict[str, Vector] = {}
    length, concatenated = len(ids), config["d_pos_emb"] is not None
    stream = [weights["transformer.wte.weight"][i].copy() for i in ids]
    places = [weights["transformer.wpe.weight"][p] for p in range(length)]
    if not concatenated:
        stream = [x + p for x, p in zip(stream, places, strict=True)]

    def linear(name: str, x: Vector) -> Vector:
        y = np.array([sum(w * v for w, v in zip(row, x, strict=True)) for row in weights[f"{name}.weight"]])
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def read(layer: str, which: str, x: Vector, p: Vector) -> Vector:
        normed = norm(config, weights, f"{layer}.ln_{which}", x)
        if not concatenated:
            return normed
        return np.concatenate([normed, norm(config, weights, f"{layer}.ln_p{which}", p)])

    def settle(x: Vector, location: str) -> Vector:
        if config["residual_activation_type"] == "relu":
            x = np.array([v if v > 0 else 0.0 for v in x])
        return sparsify(config, x, location)

    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        d_attn = config["n_head"] * config["d_head"]
        hooks[f"{i}.resid_in"] = np.array(stream)
        act_in = [sparsify(config, read(layer, "1", x, p), "attn_in") for x, p in zip(stream, places, strict=True)]
        qkv = [linear(f"{layer}.attn.c_attn", x) for x in act_in]
        q = [sparsify(config, x[:d_attn], "attn_q") for x in qkv]
        k = [sparsify(config, x[d_attn : 2 * d_attn], "attn_k") for x in qkv]
        v = [sparsify(config, x[2 * d_attn :], "attn_v") for x in qkv]
        sinks = weights.get(f"{layer}.attn.attn_imp.sink_logit")
        y = [attend(config, q, k, v, t, sinks) for t in range(length)]
        delta = [sparsify(config, linear(f"{layer}.attn.c_proj", x), "attn_out") for x in y]
        for name, values in (
            ("act_in", act_in),
            ("q", q),
            ("k", k),
            ("v", v),
            ("y", y),
            ("resid_delta", delta),
        ):
            hooks[f"{i}.attn.{name}"] = np.array(values)
        stream = [settle(x + d, "resid_post_attn") for x, d in zip(stream, delta, strict=True)]
        hooks[f"{i}.resid_mid"] = np.array(stream)
        act_in = [sparsify(config, read(layer, "2", x, p), "mlp_in") for x, p in zip(stream, places, strict=True)]
        post = [sparsify(config, activation(config, linear(f"{layer}.mlp.c_fc", x)), "mlp_neuron") for x in act_in]
        delta = [sparsify(config, linear(f"{layer}.mlp.c_proj", x), "mlp_out") for x in post]
        for name, values in (("act_in", act_in), ("post_act", post), ("resid_delta", delta)):
            hooks[f"{i}.mlp.{name}"] = np.array(values)
        stream = [settle(x + d, "resid_post_mlp") for x, d in zip(stream, delta, strict=True)]
    hooks["final_resid"] = np.array(stream)
    logits = []
    for t, x in enumerate(stream):
        row = linear("lm_head", norm(config, weights, "transformer.ln_f", x)) + weights["final_logits_bias"]
        logits.append(row + weights["bigram_table"][ids[t]] if config["enable_bigram_table"] else row)
    return np.array(logits), hooks


def norm(config: dict[str, Any], weights: dict[str, Vector], name: str, x: Vector) -> Vector:
    weight = weights[f"{name}.weight"]
    if config["rms_norm"]:
        return x / math.sqrt(math.fsum(x * x) / len(x) + np.finfo(np.float64).eps) * weight
    centered = x - math.fsum(x) / len(x)
    y = centered / math.sqrt(math.fsum(centered * centered) / len(x) + 1e-5) * weight
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def sparsify(config: dict[str, Any], x: Vector, location: str) -> Vector:
    """Keep the int(afrac·width) entries of largest magnitude, the lower index among equals; zero the rest."""
    if config["afrac"] is None or location not in config["afrac_loctypes"].split(","):
        return x
    kept = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))[: int(config["afrac"] * len(x))]
    return np.array([x[i] if i in kept else 0.0 for i in range(len(x))])


def activation(config: dict[str, Any], x: Vector) -> Vector:
    if config["activation_type"] == "relu":
        return np.array([max(v, 0.0) for v in x])
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def attend(
    config: dict[str, Any], q: list[Vector], k: list[Vector], v: list[Vector], t: int, sinks: Vector | None
) -> Vector:
    """The outputs of all heads at token ``t``, side by side."""
    width = config["d_head"]
    out = []
    for head in range(config["n_head"]):
        at = slice(head * width, (head + 1) * width)
        scores = [float(q[t][at] @ k[s][at]) / math.sqrt(width) for s in range(t + 1)]
        slots = scores if sinks is None else [*scores, float(sinks[head])]
        top = max(slots)
        total = sum(math.exp(s - top) for s in slots)
        out.append(sum(math.exp(scores[s] - top) / total * v[s][at] for s in range(t + 1)))
    return np.concatenate(out)

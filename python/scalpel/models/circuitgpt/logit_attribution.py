"""Direct logit attribution: each part of a model gets a share of a logit, and the shares add up to it exactly.

The residual stream at the end is the sum of what the embedding, the heads and the MLPs wrote. With the scale of the
final norm frozen at its value in this run, a logit is linear in those writes. AbsTopK and ReLU on the way (on a block's
output or on the stream) are linear too once their masks are frozen, and a write counts as far as all later masks let it
through. So the shares add up to the logit by algebra, not by approximation. The effect that a part has on the masks or
on the scale is not in its share.
"""

import operator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...hooks.adapters import check_unadapted
from ...topk import topk_mask
from .core import CircuitCore
from .loaded import LoadedCore
from .recording import run_with_cache

if TYPE_CHECKING:
    import pandas

Token = int | str
_HOOKS = r"\d+\.(resid_in|attn\.y|attn\.resid_delta|resid_mid|mlp\.post_act|mlp\.resid_delta)$|final_resid$"


@dataclass(frozen=True)
class LogitAttribution:
    """Parts of a logit, or of the difference of two logits, at one position of each of B prompts.

    The model has n layers of h heads. Units: logits. ``total`` is the sum of ``embedding``, ``position``, ``heads``,
    ``mlps``, ``attn_bias``, ``mlp_bias``, ``norm_bias``, ``final_bias``, ``bigram`` and ``interventions``. ``y`` and
    ``post_act`` split ``heads`` and ``mlps`` into channels and are not added again.
    """

    embedding: Tensor  # (B,) the token at the position
    position: Tensor  # (B,) its position; zero where positions are concatenated, since they are then not in the stream
    heads: Tensor  # (B, n, h)
    mlps: Tensor  # (B, n)
    attn_bias: Tensor  # (B, n) bias of the projection into the stream
    mlp_bias: Tensor  # (B, n)
    norm_bias: Tensor  # (B,) bias of the final norm
    final_bias: Tensor  # (B,)
    bigram: Tensor  # (B,)
    interventions: Tensor  # (B,) what hooks and ablations on the stream or on block outputs added
    y: Tensor  # (B, n, n_head · d_head) for each channel of attn.y
    post_act: Tensor  # (B, n, d_mlp) for each neuron
    total: Tensor  # (B,) the logit, or the difference, as the model gives it
    tokens: tuple[int, ...]
    positions: Tensor  # (B,) the column that was looked at in each prompt

    def parts(self) -> dict[str, Tensor]:
        """Give the shares (B,) by name (``head 0.3``, ``mlp 1``, ``attn_bias 0``); their sum is ``total``."""
        named = {"embedding": self.embedding, "position": self.position}
        for layer in range(self.mlps.shape[1]):
            for head in range(self.heads.shape[2]):
                named[f"head {layer}.{head}"] = self.heads[:, layer, head]
            named[f"attn_bias {layer}"] = self.attn_bias[:, layer]
            named[f"mlp {layer}"] = self.mlps[:, layer]
            named[f"mlp_bias {layer}"] = self.mlp_bias[:, layer]
        rest = ("norm_bias", "final_bias", "bigram", "interventions")
        return named | {name: getattr(self, name) for name in rest}

    def nodes(self) -> dict[str, Tensor]:
        """Give the shares (B,) of nodes by name (``2.attn.y:17``, ``2.mlp.post_act:5``).

        Biases and embeddings are no nodes.
        """
        named = {}
        for hook, shares in (("attn.y", self.y), ("mlp.post_act", self.post_act)):
            for layer in range(shares.shape[1]):
                for channel in range(shares.shape[2]):
                    named[f"{layer}.{hook}:{channel}"] = shares[:, layer, channel]
        return named

    def to_dict(self) -> dict[str, Any]:
        """Give all fields as plain lists and numbers."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value.tolist() if isinstance(value, Tensor) else list(value) for name, value in values}

    def to_pandas(self, nodes: bool = False) -> "pandas.DataFrame":
        """Make a table with the columns prompt, part (or node) and value; needs pandas."""
        import pandas

        named = self.nodes() if nodes else self.parts()
        count = len(self.total)
        return pandas.DataFrame(
            {
                "prompt": [i for _ in named for i in range(count)],
                "node" if nodes else "part": [name for name in named for _ in range(count)],
                "value": [float(x) for value in named.values() for x in value],
            }
        )


@torch.no_grad()
def logit_attribution(
    model: LoadedCore,
    input_ids: Tensor,
    tokens: Token | tuple[Token, Token],
    position: int = -1,
    **inputs: Any,
) -> LogitAttribution:
    """Split a logit into what each head, MLP and node contributes: :meth:`scalpel.CircuitGPT.logit_attribution`."""
    check_unadapted(model, "the parts of a logit are computed from the weights")
    ids = _token_ids(model, tokens)
    input_ids = model._checked_ids(input_ids)
    inputs |= {name: value.to(model.device) for name, value in inputs.items() if isinstance(value, Tensor)}
    logits, acts = run_with_cache(model, input_ids, _HOOKS, **inputs)
    assert logits is not None
    columns = _columns(input_ids, inputs.get("attention_mask"), position)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    at = {name: value[rows, columns] for name, value in acts.items()}
    logit = logits[rows, columns]
    sign = torch.tensor([1.0, -1.0][: len(ids)], dtype=logit.dtype, device=logit.device)

    def chosen(table: Tensor) -> Tensor:
        return table[..., list(ids)].to(logit.dtype) @ sign

    unembed = sign @ model.lm_head.weight[list(ids)]
    direction, norm_bias = _through_final_norm(model, at["final_resid"], unembed)
    back = _Backwards(model, at)
    for name in reversed(model.hook_names):
        direction = back.step(name, direction)
    start, token_ids = back.start, input_ids[rows, columns]
    word = model.transformer.wte(token_ids)
    place = torch.zeros_like(word)
    if model.config.d_pos_emb is None:
        place = model._positions(input_ids, inputs.get("attention_mask"), inputs.get("position_ids"))
        place = place.expand(*input_ids.shape, -1)[rows, columns]
    zeros = torch.zeros_like(norm_bias)
    layers = range(model.config.n_layer)

    def stacked(values: dict[int, Tensor], width: int) -> Tensor:
        return torch.stack([values[i] for i in layers], 1) if layers else zeros.new_zeros(len(rows), 0, width)

    y = stacked(back.y, model.config.d_attn)
    post_act = stacked(back.post_act, model.config.d_mlp or 0)
    return LogitAttribution(
        embedding=(word * direction).sum(-1),
        position=(place * direction).sum(-1),
        heads=y.unflatten(-1, (model.config.n_head, -1)).sum(-1),
        mlps=post_act.sum(-1),
        attn_bias=stacked(back.attn_bias, 1)[..., 0],
        mlp_bias=stacked(back.mlp_bias, 1)[..., 0],
        norm_bias=norm_bias,
        final_bias=chosen(model.final_logits_bias) + zeros,
        bigram=zeros if model.bigram_table is None else chosen(model.bigram_table[token_ids]),
        interventions=back.interventions + ((start - word - place) * direction).sum(-1),
        y=y,
        post_act=post_act,
        total=chosen(logit),
        tokens=ids,
        positions=columns,
    )


class _Backwards:
    """Walks the hooks from last to first with the direction (B, d_model) that the logit reads there."""

    def __init__(self, model: CircuitCore, at: dict[str, Tensor]) -> None:
        self.model, self.at, self.config = model, at, model.config
        self.y: dict[int, Tensor] = {}
        self.post_act: dict[int, Tensor] = {}
        self.attn_bias: dict[int, Tensor] = {}
        self.mlp_bias: dict[int, Tensor] = {}
        self.interventions = torch.zeros_like(at["final_resid"][..., 0])
        self.start = at[model.hook_names[0]]  # the stream as the first hook leaves it

    def step(self, name: str, direction: Tensor) -> Tensor:
        if name == self.model.hook_names[0]:
            return direction
        if name == "final_resid":
            return self._stream(name, f"{self.config.n_layer - 1}.mlp", direction)
        layer, _, hook = name.partition(".")
        if hook == "resid_in":
            return self._stream(name, f"{int(layer) - 1}.mlp", direction)
        return self._stream(name, f"{layer}.attn", direction) if hook == "resid_mid" else direction

    def _stream(self, name: str, block: str, direction: Tensor) -> Tensor:
        """Go back from the hook ``name`` on the stream to before the write of ``block`` (``0.attn``, ``0.mlp``)."""
        layer, kind = block.split(".")
        before = self.at[f"{layer}.resid_in" if kind == "attn" else f"{layer}.resid_mid"]
        delta = self.at[f"{block}.resid_delta"]
        mixed = before + delta
        settled = mixed
        if self.config.residual_activation_type == "relu":
            settled = mixed.relu()
        kept = self._kept(settled, f"resid_post_{kind}")
        self._add(self.at[name] - settled * kept, direction)
        direction = direction * kept
        if self.config.residual_activation_type == "relu":
            direction = direction * (mixed > 0)
        self._write(int(layer), kind, delta, direction)
        return direction

    def _write(self, layer: int, kind: str, delta: Tensor, direction: Tensor) -> None:
        block = self.model.transformer.h[layer]
        projection = block.attn.c_proj if kind == "attn" else block.mlp.c_proj
        source = self.at[f"{layer}.attn.y" if kind == "attn" else f"{layer}.mlp.post_act"]
        written = projection(source)
        kept = self._kept(written, f"{kind}_out")
        self._add(delta - written * kept, direction)
        direction = direction * kept
        shares = source * (direction @ projection.weight)
        bias = torch.zeros_like(shares[..., :1])
        if projection.bias is not None:
            bias = (direction @ projection.bias)[..., None]
        if kind == "attn":
            self.y[layer], self.attn_bias[layer] = shares, bias
        else:
            self.post_act[layer], self.mlp_bias[layer] = shares, bias

    def _kept(self, value: Tensor, location: str) -> Tensor:
        k = self.config.k_at(location, value.shape[-1])
        return torch.ones_like(value) if k is None else topk_mask(value, k).to(value.dtype)

    def _add(self, foreign: Tensor, direction: Tensor) -> None:
        """Count what an intervention added to the stream: the recorded value minus the computed one."""
        self.interventions = self.interventions + (foreign * direction).sum(-1)


def _through_final_norm(model: CircuitCore, x: Tensor, unembed: Tensor) -> tuple[Tensor, Tensor]:
    """Find the direction (B, d_model) that reads the logit from the stream, and the share of the norm's bias (B,)."""
    norm = model.transformer.ln_f
    direction = (unembed * norm.weight).expand_as(x)
    if model.config.rms_norm:
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        return direction * (x.square().mean(-1, keepdim=True) + eps).rsqrt(), x.new_zeros(len(x))
    direction = direction * (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    bias = x.new_zeros(()) if norm.bias is None else norm.bias @ unembed
    return direction - direction.mean(-1, keepdim=True), bias.expand(len(x))


def _token_ids(model: LoadedCore, tokens: Token | tuple[Token, Token]) -> tuple[int, ...]:
    pair = isinstance(tokens, tuple | list)
    chosen: tuple[Any, ...] = tuple(tokens) if isinstance(tokens, tuple | list) else (tokens,)
    if pair and len(chosen) != 2:
        raise ValueError(f"tokens has {len(chosen)} entries; give one token, or the pair (correct, wrong)")
    return tuple(_token_id(model, token) for token in chosen)


def _token_id(model: LoadedCore, token: Token) -> int:
    if isinstance(token, str):
        if model.tokenizer is None:
            raise ValueError(f"{token!r} is text and the model has no tokenizer; give the token's id")
        return model.tokenizer.single(token)
    try:
        token = operator.index(token)
    except TypeError:
        raise TypeError(f"token is {token!r}; it must be an id (an int) or a text that is one token") from None
    if not 0 <= token < model.config.vocab_size:
        raise ValueError(f"token id {token} is outside the vocabulary, 0 to {model.config.vocab_size - 1}")
    return token


def _columns(input_ids: Tensor, mask: Tensor | None, position: int) -> Tensor:
    batch, length = input_ids.shape
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None and mask.dim() == 2:
        real = mask.bool()
    column = torch.arange(length, device=input_ids.device).expand(batch, length)
    last = torch.where(real, column, -1).amax(-1)
    columns = last + 1 + position if position < 0 else torch.full_like(last, position)
    inside = (columns >= 0) & (columns < length)
    if not bool(inside.all()) or not bool(real.gather(-1, columns[:, None]).all()):
        raise ValueError(f"position {position} is not a real token of every prompt; the batch is {(batch, length)}")
    return columns

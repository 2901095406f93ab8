"""A model built by hand that runs the seed's algorithm and nothing else: the positive control.

One head with a zero query averages over the context, one channel of its value says "this is a bracket", and the
head's output is compared with θ. Its critical length is known exactly, so it tells whether a measurement would find
the law if the law were there.
"""

import math

import torch

from ...models.circuitgpt.config import CircuitGPTConfig
from ...models.circuitgpt.model import CircuitGPT
from ...models.tokenizer import Tokenizer
from ...tasks.brackets import closers

# Residual channels of the construction.
_IS_EVIDENCE, _IS_OTHER, _MEAN, _ONE = range(4)


def threshold_circuit(
    tokenizer: Tokenizer,
    theta: float,
    *,
    sink: float | None = None,
    evidence: str = "[",
    block_size: int = 512,
) -> CircuitGPT:
    """A CircuitGPT that answers "]]\\n" iff k / (n + sink) > theta, k counting the tokens ``evidence``.

    ``sink``: tokens' worth of attention that the sink takes, above 0; None leaves the sink out. ``evidence`` may be
    "<s>", of which there is one whatever the brackets: then the critical length is constant.
    """
    if theta <= 0 or (sink is not None and sink <= 0):
        raise ValueError(f"theta is {theta} and sink {sink}; both must be above 0")
    ids = closers(tokenizer)
    config = CircuitGPTConfig(
        block_size=block_size,
        vocab_size=tokenizer.vocab_size,
        n_layer=1,
        n_head=1,
        d_head=4,
        d_model=4,
        d_mlp=1,
        rms_norm=True,
        tied_unembed=False,
        sink=sink is not None,
    )
    model = CircuitGPT(config)
    model.tokenizer = tokenizer
    model.card = {"name": f"threshold circuit, θ = {theta}, sink = {sink}, evidence {evidence!r}"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name else 0.0)
        # Every embedding has the same norm, so the norms scale all of them alike.
        model.transformer.wte.weight[:, _IS_OTHER] = 1.0
        token = tokenizer.token_to_id(evidence) if evidence == "<s>" else tokenizer.single(evidence)
        model.transformer.wte.weight[token] = torch.eye(4, dtype=torch.float32, device="cpu")[_IS_EVIDENCE]
        model.transformer.wte.weight[:, _ONE] = 1.0
        attention = model.transformer.h[0].attn
        value_rows = slice(2 * config.d_attn, 3 * config.d_attn)
        attention.c_attn.weight[value_rows][_IS_EVIDENCE, _IS_EVIDENCE] = 1.0
        # The norm divides by √(2/4); undone here, so that the mean is written in tokens per token.
        attention.c_proj.weight[_MEAN, _IS_EVIDENCE] = math.sqrt(2 / 4)
        if sink is not None:
            attention.attn_imp.sink_logit.fill_(math.log(sink))
        model.lm_head.weight[ids.two, _MEAN] = 1.0
        model.lm_head.weight[ids.two, _ONE] = -theta
    return model.eval()

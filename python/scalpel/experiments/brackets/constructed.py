"""A positive control: a model built by hand that runs the seed's algorithm and nothing else.

One head with a zero query averages over the context. One channel of its value marks brackets, and the head's output is
compared with θ. The critical length is known exactly, so the model shows whether a measurement would find the law if
the law held.
"""

import math

import torch

from ...models.circuitgpt.config import CircuitGPTConfig
from ...models.circuitgpt.model import CircuitGPT
from ...models.tokenizer import Tokenizer
from ...tasks.brackets import closers

# Channels of the residual stream.
_IS_EVIDENCE, _IS_OTHER, _MEAN, _ONE = range(4)


def threshold_circuit(
    tokenizer: Tokenizer,
    theta: float,
    *,
    sink: float | None = None,
    evidence: str = "[",
    block_size: int = 512,
) -> CircuitGPT:
    """Build a CircuitGPT that answers "]]\\n" iff k / (n + sink) > theta, where k counts the tokens ``evidence``.

    Args:
        tokenizer: Must hold both answers and ``evidence`` as single tokens.
        theta: The threshold, above 0.
        sink: How many tokens' worth of attention the sink takes, above 0; None for a model without a sink.
        evidence: The token that is counted. A prompt holds exactly one "<s>", so with that the critical length is
            constant.
        block_size: Tokens in the context.

    Returns:
        The model, in eval mode and with its tokenizer.

    Raises:
        ValueError: ``theta`` or ``sink`` is not above 0.
        Refused: The tokenizer splits an answer.
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
        # The norm divides by √(2/4). Undoing that here makes the written value the share of evidence among the tokens.
        attention.c_proj.weight[_MEAN, _IS_EVIDENCE] = math.sqrt(2 / 4)
        if sink is not None:
            attention.attn_imp.sink_logit.fill_(math.log(sink))
        model.lm_head.weight[ids.two, _MEAN] = 1.0
        model.lm_head.weight[ids.two, _ONE] = -theta
    return model.eval()

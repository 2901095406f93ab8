"""Spectra of a transformers model: ``python examples/spectra.py [MODEL [TEXT]]``.

MODEL is a folder or an id on the hub (GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3), or a GGUF file; without one, a
small GPT-2 with random weights is made and nothing is downloaded. A spectrum of a trained model means little without
that of an untrained model beside it: ``scalpel analyze`` computes both, over a whole text.
"""

import sys
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import scalpel

TEXT = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)"
)


def main(name: str | None = None, text: str = TEXT) -> None:
    torch.manual_seed(0)
    if name is None:
        sizes = {"vocab_size": 256, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        ids = torch.tensor([list(text.encode())])[:, :128]
    elif name.endswith(".gguf"):
        from scalpel.models.gguf import plain_model, tokenizer

        model, ids = plain_model(name), torch.tensor([tokenizer(name).encode(text)])
    else:
        model = AutoModelForCausalLM.from_pretrained(name)
        ids = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")["input_ids"]
    model = model.eval()
    hooks = [f"{i}.resid_in" for i in range(model.config.num_hidden_layers)] + ["final_resid"]

    # Covariance: how many directions hold the residual stream's values, and the loss's gradients there?
    states = scalpel.collect(model, [ids], [*hooks, *(f"{hook}.grad" for hook in hooks)])
    for hook in hooks:
        values, gradients = states[hook], states[f"{hook}.grad"]
        print(
            f"{hook:>12}: first component {values.explained_variance_ratio(1)[0]:.1%}, effective rank "
            f"{float(values.effective_rank()):.1f}; gradients {gradients.explained_variance_ratio(1)[0]:.1%}, "
            f"{float(gradients.effective_rank()):.1f}"
        )

    # Jacobian: what does each layer, and what do all of them together, do to a direction at the last token?
    for source, target in [*pairwise(hooks), (hooks[0], hooks[-1])]:
        J = scalpel.jacobian(model, ids, source, target, positions=-1)
        print(f"{source:>12} → {target}: σ = {', '.join(f'{s:.2f}' for s in J.spectrum(5))} …")

    # The semigroup of depth: growth in nats per layer, less the growth of the residual stream itself.
    exponents = scalpel.lyapunov(model, ids[:, :16], 4, cumulative=False)
    print("exponents less growth:", ", ".join(f"{e:+.3f}" for e in exponents.exponents_less_growth))


if __name__ == "__main__":
    main(*sys.argv[1:])

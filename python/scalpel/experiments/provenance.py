"""What a figure was computed from."""

from numbers import Integral
from typing import Any

from ..models.circuitgpt.model import CircuitGPT
from ..models.fingerprint import fingerprint
from ..tasks.refused import Refused


def model_provenance(model: CircuitGPT, **options: Any) -> dict[str, Any]:
    """Name, fingerprint of the weights, dtype, training seed and commit of a model, and the run's options."""
    return {
        "model": model.card.get("name", "unnamed"),
        "weights_sha256": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "training_seed": model.card.get("recipe", {}).get("seed"),
        "training_commit": model.card.get("commit"),
        "options": options,
    }


def at_least(least: int, **options: Any) -> None:
    """ValueError for an option below ``least`` or that is no whole number, naming it."""
    for name, value in options.items():
        if not isinstance(value, Integral):
            raise ValueError(f"option {name!r} is {value!r}; it must be a whole number, {least} or more")
        if value < least:
            raise ValueError(f"option {name!r} is {value}; it must be {least} or more")


def check_share(**options: float) -> None:
    """ValueError for an option that isn't a share from 0 to 1, naming it."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"option {name!r} is {value}; it is a share from 0 to 1")


def longest_asked(model: CircuitGPT, offsets: int, least_accuracy: float) -> int:
    """Tokens of the longest lists asked: what ``offsets`` leaves of the context.

    Refused for a model without a tokenizer, since lists are text, and where the context is too short; ValueError for
    what could be asked of no model.
    """
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer; lists of brackets are text. Set model.tokenizer")
    at_least(0, offsets=offsets)
    check_share(least_accuracy=least_accuracy)
    most = model.config.block_size - 64
    if offsets > most:
        allowed = f"give from 0 to {most}" if most >= 0 else "no list fits it"
        raise Refused(
            f"option 'offsets' is {offsets} and the context holds {model.config.block_size} tokens, of which 64 must "
            f"be left to ask: {allowed}"
        )
    return model.config.block_size - offsets


def caution(model: CircuitGPT) -> str:
    """What the card says of the lengths trained on, as a caution; empty where it says nothing."""
    longest = model.card.get("longest_list_trained_on_elements")
    if longest is None:
        return ""
    return (
        f"The longest list in the training text had {longest} elements, about {2 * longest} tokens here. Beyond that, "
        "dilution and the mere novelty of the length are not told apart by this measurement."
    )

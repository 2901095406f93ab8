"""What a result was computed from, and checks of options that several experiments share."""

from numbers import Integral
from typing import Any

from ..models.circuitgpt.model import CircuitGPT
from ..models.fingerprint import fingerprint
from ..tasks.refused import Refused


def model_provenance(model: CircuitGPT, **options: Any) -> dict[str, Any]:
    """What a result needs to say of its model, and the options of the run.

    Args:
        model: The model that is measured.
        options: The options of the experiment.

    Returns:
        The model's name, the SHA-256 of its weights, its dtype, and the seed and commit of its training, as far as its
        card holds them, and the options.
    """
    return {
        "model": model.card.get("name", "unnamed"),
        "weights_sha256": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "training_seed": model.card.get("recipe", {}).get("seed"),
        "training_commit": model.card.get("commit"),
        "options": options,
    }


def at_least(least: int, **options: Any) -> None:
    """ValueError, which names the option, if one is not a whole number or is below ``least``."""
    for name, value in options.items():
        if not isinstance(value, Integral):
            raise ValueError(f"option {name!r} is {value!r}; it must be a whole number, {least} or more")
        if value < least:
            raise ValueError(f"option {name!r} is {value}; it must be {least} or more")


def check_share(**options: float) -> None:
    """ValueError, which names the option, if one is not between 0 and 1."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"option {name!r} is {value}; it is a share from 0 to 1")


def longest_asked(model: CircuitGPT, offsets: int, least_accuracy: float) -> int:
    """The length in tokens of the longest lists that a model is asked about.

    Args:
        model: The model that is asked.
        offsets: How many positions of the context stay free, so that a list may begin at any of them.
        least_accuracy: An option of the experiment, which is checked here.

    Returns:
        The length of the context less ``offsets``.

    Raises:
        Refused: The model has no tokenizer, or its context is too short.
        ValueError: ``offsets`` is negative, or ``least_accuracy`` not between 0 and 1.
    """
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer, and lists of brackets are text: set model.tokenizer")
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
    """A caution about lengths beyond those of the training text; empty if the model's card doesn't name these."""
    longest = model.card.get("longest_list_trained_on_elements")
    if longest is None:
        return ""
    return (
        f"The longest list in the training text had {longest} elements, about {2 * longest} tokens here. Beyond that, "
        "this measurement can't tell dilution from the mere novelty of the length."
    )

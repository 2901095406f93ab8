"""Which estimators there are, and which activations the relevance lens has a rule for."""

from __future__ import annotations

from ...models.decoders.decoder import Decoder

__all__ = ["ESTIMATORS", "check_activation", "check_estimator"]

ESTIMATORS = ("jacobian", "relevance")

# Those that are x times a gate of x. Tanh is none, and what its rule should be was never published.
_WITH_A_RULE = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


def check_estimator(estimator: str) -> None:
    """Check the name of an estimator.

    Raises:
        ValueError: For an unknown one.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; allowed: {', '.join(map(repr, ESTIMATORS))}")


def check_activation(decoder: Decoder) -> None:
    """Check that the relevance lens has a rule for the activation of a decoder.

    Raises:
        ValueError: If it has none.
    """
    if decoder.config.activation not in _WITH_A_RULE:
        raise ValueError(
            f"estimator='relevance' has no rule for the activation {decoder.config.activation!r}; it has rules for "
            f"{', '.join(_WITH_A_RULE)}: use estimator='jacobian'"
        )

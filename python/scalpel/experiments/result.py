"""The result of an experiment: a prediction made first, a measurement, its null, and the verdict that follows."""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .._json import plain
from .verdicts import VERDICTS, Verdict


@dataclass(frozen=True)
class Result:
    """One question with its answer.

    Attributes:
        name: The experiment's name.
        question: What is asked.
        prediction: What was predicted before the measurement. This and the next three are plain data (numbers, lists,
            dicts) with a ``summary`` in words.
        measured: What was measured.
        interval: The 95 % intervals of the measured figures.
        null: What the nulls gave.
        verdict: What follows from these by the experiment's rule.
        seed_figure: What the founding document states. It is shown and never decides.
        figures: The data of each picture, by name; :mod:`scalpel.report.pictures.figures` lists the kinds.
        provenance: What the result was computed from, and when the prediction and the measurement were made.
    """

    name: str
    question: str
    prediction: dict[str, Any]
    measured: dict[str, Any]
    interval: dict[str, Any]
    null: dict[str, Any]
    verdict: Verdict
    seed_figure: str
    figures: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self, indent: int | None = None) -> str:
        """The whole result as JSON.

        Args:
            indent: As for ``json.dumps``.

        Returns:
            A JSON object. Infinities and NaN are written as null, since JSON has neither.

        Example:
            >>> result = scalpel.experiments.run("minimal_simulator", k_max=3, n_max=30, samples=3)
            >>> result.to_json()[:28]
            '{"name": "minimal_simulator"'
        """
        return json.dumps(plain(asdict(self)), indent=indent, allow_nan=False)


class Protocol:
    """Makes sure that a prediction is stored before anything is measured, and doesn't change afterwards.

    An experiment calls :meth:`predict`, then :meth:`measuring`, then measures, then calls :meth:`conclude`. In any
    other order they raise RuntimeError.

    Args:
        name: The experiment's name.
        question: What is asked.
        seed_figure: What the founding document states.
        provenance: What the result is computed from.

    Example:
        >>> from scalpel.experiments.result import Protocol
        >>> protocol = Protocol("sum", "What is 1 + 1?", "none", {})
        >>> protocol.predict({"summary": "2", "value": 2})
        >>> protocol.measuring()
        >>> value = 1 + 1
        >>> verdict = "reproduced" if value == 2 else "not reproduced"
        >>> protocol.conclude(measured={"value": value}, interval={}, null={}, verdict=verdict).verdict
        'reproduced'
    """

    def __init__(self, name: str, question: str, seed_figure: str, provenance: Mapping[str, Any]) -> None:
        self._name, self._question, self._seed_figure = name, question, seed_figure
        self._provenance = dict(provenance)
        self._prediction: str | None = None

    def predict(self, prediction: Mapping[str, Any]) -> None:
        """Store the prediction, as text, so that later changes to the dict don't reach it."""
        if self._prediction is not None:
            raise RuntimeError(f"{self._name}: a prediction was made already, and it can't be replaced")
        self._prediction = json.dumps(plain(dict(prediction)), allow_nan=False)
        self._provenance["predicted_at"] = _now()

    def measuring(self) -> None:
        """Mark the beginning of the measurement. RuntimeError if nothing was predicted yet."""
        if self._prediction is None:
            raise RuntimeError(f"{self._name}: predict() comes before the first measurement")
        self._provenance.setdefault("measuring_from", _now())

    def conclude(
        self,
        *,
        measured: Mapping[str, Any],
        interval: Mapping[str, Any],
        null: Mapping[str, Any],
        verdict: Verdict,
        figures: Mapping[str, Any] | None = None,
    ) -> Result:
        """The result. RuntimeError if the prediction or the beginning of the measurement is missing."""
        if self._prediction is None:
            raise RuntimeError(f"{self._name}: predict() comes before conclude()")
        if "measuring_from" not in self._provenance:
            raise RuntimeError(
                f"{self._name}: measuring(), which marks the beginning of the measurement, wasn't called"
            )
        if verdict not in VERDICTS:
            raise ValueError(f"verdict is {verdict!r}; allowed: {', '.join(VERDICTS)}")
        return Result(
            name=self._name,
            question=self._question,
            prediction=json.loads(self._prediction),
            measured=dict(measured),
            interval=dict(interval),
            null=dict(null),
            verdict=verdict,
            seed_figure=self._seed_figure,
            figures=dict(figures or {}),
            provenance={**self._provenance, "measured_at": _now(), **environment()},
        )


def environment() -> dict[str, str]:
    """The versions that a result depends on, by name."""
    import torch

    from .._info import __version__

    return {
        "scalpel": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"

"""What an experiment gives: a prediction made first, a measurement, its null, and a verdict computed from them."""

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
    """One question, answered.

    ``prediction``, ``measured``, ``interval`` and ``null`` are plain data (numbers, lists, dicts) with their
    ``summary`` in words; ``interval`` is the 95 % bootstrap interval of the measured figures. ``seed_figure`` is
    what the founding document states; it is shown and never decides. ``figures`` holds the data of each picture.
    ``provenance`` says what it was computed from, and when the prediction and the measurement were made.
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
        """The whole result as JSON; infinities and NaN are written as null, since JSON has neither."""
        return json.dumps(plain(asdict(self)), indent=indent, allow_nan=False)


class Protocol:
    """Keeps an experiment honest: the prediction is stored before anything is measured, and can't be changed.

    Use: ``protocol = Protocol(name, question, seed_figure, provenance)``, then ``protocol.predict({...})``, then
    ``protocol.measuring()`` and measure, then ``protocol.conclude(...)``. Out of order, it raises RuntimeError.
    """

    def __init__(self, name: str, question: str, seed_figure: str, provenance: Mapping[str, Any]) -> None:
        self._name, self._question, self._seed_figure = name, question, seed_figure
        self._provenance = dict(provenance)
        self._prediction: str | None = None

    def predict(self, prediction: Mapping[str, Any]) -> None:
        """Store the prediction. It is frozen as text, so no later change to the dict reaches it."""
        if self._prediction is not None:
            raise RuntimeError(f"{self._name}: the prediction was made already; a second one is no prediction")
        self._prediction = json.dumps(plain(dict(prediction)), allow_nan=False)
        self._provenance["predicted_at"] = _now()

    def measuring(self) -> None:
        """To be called before the first measurement: RuntimeError if nothing was predicted yet."""
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
        if self._prediction is None:
            raise RuntimeError(f"{self._name}: predict() comes before conclude()")
        if "measuring_from" not in self._provenance:
            raise RuntimeError(f"{self._name}: measuring() marks the beginning of the measurement; it wasn't called")
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
    """Versions that a result depends on."""
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

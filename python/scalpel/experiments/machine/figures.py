"""Figures of an extraction: the machine, how its classes grow, and the Cayley graph and egg-box of its semigroup."""

from collections.abc import Mapping
from typing import Any

from ...semigroup.extraction.questions import NOT_VALID
from ...semigroup.extraction.result import Extraction
from ...semigroup.machine import MooreMachine
from ...semigroup.transformation import TransformationSemigroup

__all__ = ["cayley_figure", "eggbox_figure", "figures", "machine_figure"]


def figures(machine: MooreMachine | None, extractions: Mapping[str, Extraction]) -> tuple[dict[str, Any], list[str]]:
    """Figures of one machine and of how the classes of all extractions grow: (figures, what was left out and why)."""
    drawn: dict[str, Any] = {"growth": _growth(extractions)}
    if machine is None:
        return drawn, [
            "The machine, its Cayley graph and its egg-box were left out: there were more classes than the limit."
        ]
    drawn["machine"] = machine_figure(machine)
    try:
        semigroup = machine.semigroup()
    except ImportError as missing:
        return drawn, [f"The Cayley graph and the egg-box were left out: {missing}"]
    drawn["cayley"] = cayley_figure(semigroup)
    drawn["eggbox"] = eggbox_figure(semigroup)
    return drawn, []


def machine_figure(machine: MooreMachine) -> dict[str, Any]:
    """The machine's graph: states with their outputs, the start drawn bold."""
    nodes = [
        {"label": str(state), "note": "not valid" if output is NOT_VALID else f"“{output}”"}
        for state, output in enumerate(machine.outputs)
    ]
    edges = [
        {"src": state, "dst": target, "label": letter}
        for state, row in enumerate(machine.transitions)
        for letter, target in zip(machine.letters, row, strict=True)
    ]
    return {
        "kind": "digraph",
        "title": "The machine that was extracted from short words",
        "summary": "Each state with the answer that the model gives there; the start is drawn bold.",
        "nodes": nodes,
        "edges": edges,
        "start": True,
    }


def cayley_figure(semigroup: TransformationSemigroup) -> dict[str, Any]:
    """The right Cayley graph, in which an arrow multiplies an element by a letter on the right."""
    words = [" ".join(word) for word in semigroup.words()]
    edges = [
        {"src": element, "dst": int(target), "label": letter}
        for element, row in enumerate(semigroup.right_cayley_graph)
        for letter, target in zip(semigroup.names, row, strict=True)
    ]
    return {
        "kind": "digraph",
        "title": f"Right Cayley graph of its semigroup, {semigroup.size} elements",
        "summary": "Each element is shown by its shortest word; an arrow appends a letter. No identity is adjoined.",
        "nodes": [{"label": word} for word in words],
        "edges": edges,
    }


def eggbox_figure(semigroup: TransformationSemigroup) -> dict[str, Any]:
    """Green's classes: each box is a D-class, its rows are R-classes and its columns L-classes."""
    boxes = [
        {
            "cells": [[[" ".join(semigroup.word(int(e))) for e in cell] for cell in row] for row in box.elements],
            "group": box.group.tolist(),
            "above": list(box.above),
        }
        for box in semigroup.greens().egg_boxes
    ]
    groups = [group.name for group in semigroup.groups()]
    aperiodic = "aperiodic" if semigroup.is_aperiodic() else "not aperiodic"
    return {
        "kind": "eggbox",
        "title": "Egg-box picture of its semigroup",
        "summary": f"Each box is a D-class, each row an R-class, each column an L-class. Groups: "
        f"{', '.join(groups)}; {aperiodic}.",
        "boxes": boxes,
    }


def _growth(extractions: Mapping[str, Extraction]) -> dict[str, Any]:
    return {
        "kind": "curves",
        "title": "Classes of prefixes that continuations tell apart",
        "summary": "The classes of a finite machine level off; those of a counter grow with each doubling. Dashed: "
        "not finite.",
        "xlabel": "letters of the longest prefix",
        "ylabel": "classes",
        "series": [
            {
                "label": name,
                "x": [level.horizon for level in extraction.growth],
                "y": [level.classes for level in extraction.growth],
                "style": "line" if extraction.verdict == "finite" else "dashed",
            }
            for name, extraction in extractions.items()
        ],
    }

"""The seed's claims on several models: a table of verdicts for each, and how each law fares.

`python benches/evidence.py` runs every experiment on the shipped models, which takes some minutes for each, and writes
docs/evidence.json and docs/evidence.md. Folders that are given as arguments, such as other seeds made by `scalpel train
bracket-mini --seed 1`, are asked the questions on dilution as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import commit, where_measured
from scalpel.cli import bench
from scalpel.experiments import run
from scalpel.experiments.controls import Controls
from scalpel.experiments.result import Result, plain
from scalpel.experiments.suite import run_suite
from scalpel.models.circuitgpt.checkpoint import shipped_models
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.models.untrained import untrained

DOCS = Path(__file__).parents[1] / "docs"
WHOLE = ("bracket-mini", "python-small")
OF_DILUTION = ("dilution", "agreement", "causes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", help="more models, for the questions on dilution")
    folders = parser.parse_args().folders
    models: dict[str, Any] = {}

    def keep(label: str, results: dict[str, Result], refused: dict[str, str]) -> None:
        """Writes the page after every model, so that a run that is stopped leaves what it has measured."""
        models[label] = {one: row(result) for one, result in results.items()} | {"refused": refused}
        content = plain({"where": where_measured(bench.environment(), commit()), "models": models})
        (DOCS / "evidence.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        (DOCS / "evidence.md").write_text(page(content))
        print(label, flush=True)

    for name in WHOLE:
        suite = run_suite(name)
        keep(name, {result.name: result for result in suite.results}, suite.refused)
    twins = [name for name in shipped_models() if name.startswith(tuple(f"{one}-no" for one in WHOLE))]
    for name in [*twins, *folders]:
        model = CircuitGPT.from_pretrained(name)
        label = f"{model.card['name']}, seed {model.card['recipe']['seed']}" if name in folders else name
        options = {"controls": Controls({"untrained": untrained(model)})}
        keep(label, {one: run(one, model, **(options if one != "causes" else {})) for one in OF_DILUTION}, {})


def row(result: Result) -> dict[str, Any]:
    """The parts of a result that the page shows."""
    shown: dict[str, Any] = {
        part: getattr(result, part).get("summary", "") for part in ("prediction", "measured", "interval", "null")
    }
    shown |= {"verdict": result.verdict, "question": result.question, "seed_figure": result.seed_figure}
    if result.name == "dilution":
        shown["laws"] = {name: one["mean_absolute_error"] for name, one in result.measured["laws"].items()}
        shown["critical_length"] = {
            k: {name: one[name] for name in ("value", "low", "high", "status")}
            for k, one in result.measured["critical_length"].items()
        }
        shown["head"] = result.prediction.get("head", {}) | {"is_mean": result.measured["head"].get("is_mean")}
    if result.name == "agreement":
        shown["by_law"] = {name: one["plain"] for name, one in result.measured["agreement_by_law"].items()}
        shown["by_law_interval"] = result.interval["by_law"]
    if result.name == "causes":
        shown["right"] = result.measured["right"]
    return shown


def page(content: dict[str, Any]) -> str:
    models = content["models"]
    lines = [
        "# What the seed claims, and what these models do",
        "",
        f"Made by `python benches/evidence.py`; {content['where']}",
        "Every verdict is computed by the rule that the report shows beside it.",
        "",
    ]
    for name in (one for one in WHOLE if one in models):
        lines += [f"## {name}", "", "| question | seed | measured | null | verdict |", "|---|---|---|---|---|"]
        for one, of in models[name].items():
            if one != "refused":
                cells = (of["question"], of["seed_figure"], f"{of['measured']}. {of['interval']}", of["null"])
                lines.append(
                    "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + f" | **{of['verdict']}** |"
                )
        lines += [f"Refused: {one}: {why}" for one, why in models[name]["refused"].items()] + [""]
    lines += ["## Critical lengths, in tokens", ""]
    amounts = sorted({k for of in models.values() for k in of.get("dilution", {}).get("critical_length", {})})
    lines += ["| model | " + " | ".join(f"k = {k}" for k in amounts) + " | verdict on the seed's law |"]
    lines += ["|---" * (len(amounts) + 2) + "|"]
    for name, of in models.items():
        if "dilution" in of:
            shown = [length(of["dilution"]["critical_length"].get(k)) for k in amounts]
            lines.append(f"| {name} | " + " | ".join(shown) + f" | {of['dilution']['verdict']} |")
    lines += ["", "## Laws on held-out amounts", "", "Mean error of the critical length in tokens, and the share of "]
    lines[-1] += "held-out cells of the (k, n) plane in which a law with one parameter answers as the model does."
    laws = list(dict.fromkeys(law for of in models.values() for law in of.get("dilution", {}).get("laws", {})))
    cells = list(dict.fromkeys(law for of in models.values() for law in of.get("agreement", {}).get("by_law", {})))
    header = [*laws, *(f"cells: {law}" for law in cells)]
    lines += ["", "| model | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for name, of in models.items():
        if "dilution" in of:
            errors = [number(of["dilution"]["laws"].get(law, "")) for law in laws]
            shares = [share(of["agreement"], law) for law in cells]
            lines.append(f"| {name} | " + " | ".join([*errors, *shares]) + " |")
    lines += ["", "–: the law predicts nothing, or predicts no failure, or no amount has a critical length.", ""]
    lines += ["## Is it the filler?", "", "P(correct) at depth 2 at the failing length.", ""]
    kinds = list(dict.fromkeys(kind for of in models.values() for kind in of.get("causes", {}).get("right", {})))
    lines += ["| model | " + " | ".join(kinds) + " | verdict |", "|---" * (len(kinds) + 2) + "|"]
    for name, of in models.items():
        if "causes" in of:
            right = [number(of["causes"]["right"].get(kind, ""), 2) for kind in kinds]
            lines.append(f"| {name} | " + " | ".join(right) + f" | {of['causes']['verdict']} |")
    return "\n".join(lines) + "\n"


def length(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    if one["status"] == "crosses":
        return f"{one['value']:.0f} [{one['low']:.0f}, {one['high']:.0f}]"
    return {"above": f"> {one['value'] or 0:.0f}", "below": f"< {one['value'] or 0:.0f}"}.get(one["status"], "none")


def number(value: float | str | None, digits: int = 0) -> str:
    return "" if value == "" else "–" if value is None else f"{value:.{digits}f}"


def share(agreement: dict[str, Any], law: str) -> str:
    if law not in agreement["by_law"]:
        return ""
    low, high = agreement["by_law_interval"][law]
    return f"{agreement['by_law'][law]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()

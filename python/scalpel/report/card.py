"""What a page says of a model: those facts of its card by which a reader judges the results."""

from typing import Any

__all__ = ["facts", "number"]

# These entries come first, in this order and these words. Other plain entries follow under their own names.
_NAMES = {
    "name": "Model",
    "accuracy": "Accuracy on real prompts",
    "tasks": "Accuracy by task, on held-out files",
    "nonzeros": "Non-zero weights",
    "density": "Density",
    "longest_list_trained_on_elements": "Longest list trained on",
    "longest_list": "Longest list trained on",
    "seed": "Training seed",
    "seeds": "Seeds",
    "loss_nats": "Training loss, nats (weighted as in the recipe)",
    "commit": "Commit",
}
_THIN = "\N{THIN SPACE}"


def facts(card: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Sort a card's entries into facts of one line and the rest.

    Args:
        card: The model's card, plain data.

    Returns:
        The facts as (name, text), and the entries that don't fit a line, for a table of their own.
    """
    known = {key: value for key, value in card.items() if key != "hook_means"}  # thousands of numbers
    matrices = card.get("matrices")
    if isinstance(matrices, dict) and all(isinstance(m, dict) and "nonzero" in m for m in matrices.values()):
        nonzero = sum(m["nonzero"] for m in matrices.values())
        size = sum(m.get("size", 0) for m in matrices.values())
        known.setdefault("nonzeros", nonzero)
        if size:
            known.setdefault("density", nonzero / size)
    recipe = card.get("recipe")
    if isinstance(recipe, dict) and "seeds" not in card and "seed" in recipe:
        known.setdefault("seed", recipe["seed"])
    order = [*(k for k in _NAMES if k in known), *(k for k in known if k not in _NAMES)]
    lines, rest = [], {}
    for key in order:
        text = _fact(key, known[key])
        if text is not None:
            lines.append((_NAMES.get(key, key.replace("_", " ").capitalize()), text))
        if text is None or isinstance(known[key], dict):
            rest[key] = known[key]
    return lines, {key: value for key, value in rest.items() if value not in ({}, [], None)}


def _fact(key: str, value: Any) -> str | None:
    """One line of text, or None if the value doesn't fit one."""
    if isinstance(value, dict):
        if "summary" in value:
            return str(value["summary"])
        if key == "tasks" and value and all(isinstance(task, dict) for task in value.values()):
            return "; ".join(_task(name, task) for name, task in value.items())
        return _accuracy(value) if key == "accuracy" and value.get("all") is not None else None
    if isinstance(value, list):
        plain = 0 < len(value) < 9 and not any(isinstance(v, dict | list) for v in value)
        return ", ".join(number(v) for v in value) if plain else None
    if value is None or (isinstance(value, str) and len(value) > 100):
        return None  # a paragraph stands with the rest of the card
    if key in ("accuracy", "density") and isinstance(value, float):
        return percent(value)
    if key == "commit":
        return str(value)[:12]
    if key.startswith("longest_list"):
        return f"{number(value)} elements"
    return number(value)


def _task(name: str, entry: dict[str, Any]) -> str:
    """The accuracy on a task, or that it wasn't asked; the reason is in the table of the rest."""
    share = entry.get("accuracy")
    return f"{name.replace('_', ' ')} {'not asked' if share is None else percent(share)}"


def _accuracy(value: dict[str, Any]) -> str:
    text = percent(value["all"])
    interval = value.get("all_interval")
    if isinstance(interval, list) and len(interval) == 2 and None not in interval:
        text += f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    by_depth = [f"depth {depth}: {percent(value[f'depth_{depth}'])}" for depth in (1, 2) if value.get(f"depth_{depth}")]
    counts = [v for k, v in value.items() if k.startswith("prompts") and isinstance(v, int)]
    if counts:
        text += f" of {number(sum(counts))}"
    held_out = value.get("held_out")
    if isinstance(held_out, dict) and held_out:
        text += " from " + ", ".join(f"{package} {version}" for package, version in held_out.items())
    return f"{text} ({'; '.join(by_depth)})" if by_depth else text


def percent(value: float) -> str:
    """A share between 0 and 1, in per cent."""
    return f"{100 * value:.1f}{_THIN}%"


def number(value: Any) -> str:
    """A value as a page shows it: six significant digits, thin spaces between thousands, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", _THIN) if abs(value) >= 10_000 else str(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)

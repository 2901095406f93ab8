"""Sentences about what a reader of an analysis must know."""

from __future__ import annotations

from typing import Any

from .source import Source
from .text import Text


def notes_of(
    source: Source,
    text: Text,
    records: list[dict[str, Any]],
    planned: int,
    asked: int,
    shrunk: list[dict[str, int]],
    cut_off: list[dict[str, int]],
    beside: bool,
    spectra: dict[str, Any] | None,
) -> list[str]:
    """Write sentences about deviations from what was requested, and about what the figures cannot tell.

    Args:
        source: The model.
        text: The text.
        records: The records of the chunks that are finished.
        planned: How many chunks are to be measured.
        asked: The number of chunks that was requested.
        shrunk: The times that chunks were made shorter.
        cut_off: The chunks at which earlier runs were cut off.
        beside: Whether an untrained model was measured too.
        spectra: The spectra of activations and gradients; None where they were not measured.

    Returns:
        The sentences, one or more for each point.
    """
    count = len(records)
    notes = []
    if "chat_template" in text.key:
        notes.append(
            "Each chunk is the beginning of a conversation, as the tokenizer's own chat template writes it: its first "
            "message, of the user, is the text from there on, cut off where the chunk ends."
        )
    if text.rows is not None:
        notes.append(
            f"Tokens that count: {text.facts['tokens that count']}. All tokens are attended to, and the loss whose "
            "gradients are taken covers all; but Jacobians lead from the tokens that count to the tokens that count, "
            "and norms, active fractions, margins and covariances are taken over these."
        )
    if planned < asked:
        notes.append(f"The text holds {planned} whole chunks of the {asked} asked for.")
    if count == 1:
        notes.append("One chunk has no interval: nothing here says how much another stretch of this text would change.")
    if shrunk:
        steps = "; ".join(f"at chunk {step['chunk'] + 1} from {step['from']} to {step['to']} tokens" for step in shrunk)
        lengths = sorted({record["tokens"] for record in records}, reverse=True)
        notes.append(
            f"Memory ran out, or the system ended the program, and chunks were shortened: {steps}. "
            + (f"Means mix chunks of {' and '.join(map(str, lengths))} tokens." if len(lengths) > 1 else "")
        )
    for interrupted in cut_off:
        times = "an earlier run was" if interrupted["times"] == 1 else f"{interrupted['times']} earlier runs were"
        notes.append(
            f"In the middle of chunk {interrupted['chunk'] + 1} of {interrupted['tokens']} tokens {times} cut off from "
            "outside. Systems that are short of memory do that: --length and --tangents make a chunk smaller."
        )
    if source.kind == "stream":
        notes.append(
            "The model was read a layer at a time. The exponents of the product, its spectra by depth and the "
            "alignment of layers need the layers in reverse order, too, and are not here; frame growth is not the "
            "exponents. There is no untrained model beside it."
        )
        if "bfloat16" in str(source.facts["dtype"]):
            notes.append("Products are bfloat16: singular values are good to about one per cent of the largest.")
    elif not beside:
        notes.append("There is no untrained model beside it, so nothing says which of this is due to training.")
    if all(share == 1 for record in records for share in record["trained"]["active"].values()):
        notes.append("No hook holds a zero: active fractions are 1 throughout, and no TopK has a margin.")
    if beside and count > 1:
        notes.append(
            "The untrained model was measured at the first chunk alone, so its curves have no intervals; the trained "
            "model's means are over all chunks."
        )
    for side in ("trained", "untrained"):
        unconverged = sum(not record[side]["converged"] for record in records if side in record)
        if unconverged:
            worst = max(record[side]["residual"] for record in records if side in record)
            notes.append(
                f"{side.capitalize()}: in {unconverged} of {sum(side in record for record in records)} chunks some "
                f"singular values did not converge (largest residual {worst:.1e}); they may be too small."
            )
    if spectra is not None:
        constant = [name for name, figures in spectra["trained"].items() if figures["variance"] == 0]
        if constant:
            notes.append(
                f"Nothing varies at {', '.join(constant)}. Gradients of the next-token loss need stretches of two "
                "tokens or more."
            )
        short_of_rows = [name for name, figures in spectra["trained"].items() if figures["count"] < figures["dim"]]
        if short_of_rows:
            rows, dim = spectra["trained"][short_of_rows[0]]["count"], spectra["trained"][short_of_rows[0]]["dim"]
            notes.append(
                f"Spectra of hooks: {rows} rows in {dim} dimensions at {short_of_rows[0]}"
                + (f" and {len(short_of_rows) - 1} more" if len(short_of_rows) > 1 else "")
                + ". Ranks can't exceed the number of rows there, and are too small: give a longer text or --spectra."
            )
    elif source.kind == "stream":
        notes.append("Spectra of activations and gradients need the model in memory, and are not here.")
    return [note.strip() for note in notes]

"""Find the semigroup that a model's tokens generate: ``python examples/token_semigroup.py [MODEL]``.

MODEL is one of the shipped models of a machine (mod3-mini, flip-flop-mini or parity-mini), or a folder that ``scalpel
train`` wrote for one.
"""

import sys

import scalpel


def main(name: str = "mod3-mini") -> None:
    model = scalpel.CircuitGPT.from_pretrained(name)
    letters, answers = model.card["machine"]["letters"], model.card["machine"]["outputs"]

    extraction = scalpel.semigroup.extract(model, letters, answers)
    print(extraction.summary())
    for reason in extraction.reasons:
        print("  against it:", reason)
    if extraction.machine is None:
        return

    for state, row in enumerate(extraction.machine.transitions):
        moves = ", ".join(f"{letter} → {target}" for letter, target in zip(letters, row, strict=True))
        print(f"state {state} says {extraction.machine.outputs[state]!r}: {moves}")

    semigroup = extraction.semigroup()
    print(f"{semigroup.size} elements: {', '.join(' '.join(word) for word in semigroup.words())}")
    for box in semigroup.greens().egg_boxes:
        rows, columns, size = box.elements.shape
        print(f"D-class of {rows} × {columns} H-classes of {size}, {'regular' if box.regular else 'not regular'}")
    print("groups:", ", ".join(group.name for group in semigroup.groups()))
    print("aperiodic" if semigroup.is_aperiodic() else f"not aperiodic: {semigroup.word(semigroup.periodic_element())}")
    print("the nulls:", extraction.nulls)


if __name__ == "__main__":
    main(*sys.argv[1:])

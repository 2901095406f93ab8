"""Everything that turns a hook's name and a user's batch into a place in a model, and into rows of values there.

A hook is a named value in a forward pass. This room stands below the models and imports none of them.

- :mod:`.names`: the names of a layer's hooks in order, TransformerLens's names and module paths for them, and the
  error for an unknown name.
- :mod:`.wiring`: which hooks read which, whether a path leads from a source to a target, and at which tokens.
- :mod:`.positions`: which tokens of a text are chosen, and reading and adding at them.
- :mod:`.modules`: reading and replacing the input or output of a module, and whose hooks are on it.
- :mod:`.masks`: watching what goes into each AbsTopK and ReLU.
- :mod:`.inputs`: token ids, masks, position ids and padding, read and checked.
- :mod:`.running`: running a user's model in evaluation mode, and leaving it as it was.
- :mod:`.scope`: settings that hold inside a ``with`` block.
"""

"""The error that says that a model can't be asked something, and why."""

__all__ = ["Refused"]


class Refused(ValueError):
    """A model can't be used for a task, experiment or extraction; the message says why.

    The reason lies in the model: it has no tokenizer, its tokenizer splits an answer, its context is too short, or its
    logits aren't finite. Code that asks many things of a model catches this error and goes on with the next question.
    An option that is wrong for every model raises a plain ValueError, and so does a mistake in the library's own code.
    """

"""What says that a model can't be put to something, and why: no other error means that."""

__all__ = ["Refused"]


class Refused(ValueError):
    """This model can't be put to this task, experiment or extraction; the message says why.

    The reason lies in the model: it has no tokenizer, its tokenizer splits an answer, its context is too short, its
    logits aren't finite. Whoever asks many things of a model goes on with the next one. An option that no model could
    be asked with is a plain ValueError, and so is a mistake in the library's own code: neither is a refusal.
    """

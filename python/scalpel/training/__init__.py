"""Training the models that are shipped, and small ones to study.

- :mod:`.recipe`: what decides a run; :mod:`.loop`: the steps, and resuming after a stop.
- :mod:`.bracket_mini`, :mod:`.python_small`, :mod:`.machines`: the shipped models, one recipe each.
- :mod:`.text`, :mod:`.python_text`: batches of training text and their loss; :mod:`.tokenizer`: the tokenizer.
- :mod:`.study`: models kept at several steps of training; :mod:`.commit`: the source that a model was trained by.
"""

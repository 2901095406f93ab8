"""Tasks: the texts that models are trained on and asked about, and how an answer is judged.

- :mod:`.brackets`, :mod:`.quotes`, :mod:`.set_or_string`: the questions of each task.
- :mod:`.evidence`, :mod:`.bracket_words`: bracket prompts in which one thing varies, and the same prompts as words.
- :mod:`.corpus`: the training text of the shipped models; :mod:`.held_out`: text that none of them has seen.
- :mod:`.literals`, :mod:`.source_files`: what these texts are made of, read from Python files.
"""

"""Tasks: the texts that a model is asked about, and how an answer is judged."""

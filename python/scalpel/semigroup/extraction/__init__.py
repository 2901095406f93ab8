"""Machines out of models: whether a model acts, on words over some letters, like a finite machine."""

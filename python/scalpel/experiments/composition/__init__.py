"""Whether the mean Jacobians of a model's parts compose to those of the whole."""

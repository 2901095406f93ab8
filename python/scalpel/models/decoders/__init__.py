"""Dense decoders of the transformers library: how to read configs and weights, with one file for each family."""

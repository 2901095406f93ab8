"""Dense decoders of transformers: what a family's config and weights are, a file a family."""

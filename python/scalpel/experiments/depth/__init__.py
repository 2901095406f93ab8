"""Whether layers lose directions for good."""

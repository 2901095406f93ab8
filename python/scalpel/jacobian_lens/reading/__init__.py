"""Reading through a lens: what layers lead to, with intervals, and vectors without a matrix."""

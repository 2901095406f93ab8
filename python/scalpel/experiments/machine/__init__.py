"""Whether a model is a finite machine, and whether few nodes suffice for a task."""

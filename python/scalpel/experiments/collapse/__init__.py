"""Whether AbsTopK collapses representations as a model trains."""

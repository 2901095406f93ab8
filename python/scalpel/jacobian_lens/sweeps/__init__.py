"""One prompt's matrices: cotangents that go back through all layers at once."""

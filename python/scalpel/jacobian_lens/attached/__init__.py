"""The model that a lens is attached to: where its layers are, what is there for a text, and its norm and head."""

"""Everything that turns a hook's name and a user's batch into a place in a model and its rows."""

"""Bracket counting: where its answer fails, which law says so beforehand, and why it fails."""

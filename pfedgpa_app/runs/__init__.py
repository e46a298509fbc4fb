"""One run, from its first round to its last plot."""

"""Run one experiment from its first round to its last plot, and read finished runs."""

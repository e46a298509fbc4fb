"""Write and read a run's results: its log, its tables, its plots."""

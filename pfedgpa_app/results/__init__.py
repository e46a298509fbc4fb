"""What a run leaves behind: its log, its tables, its plots."""

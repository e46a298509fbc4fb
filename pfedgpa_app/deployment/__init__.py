"""Run the app on real SuperLink and SuperNode processes: keys, checks, and a rehearsal."""

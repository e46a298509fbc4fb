"""Where settings, YAML files and the registry of methods meet, and nowhere else."""

"""Settings, YAML files and the registry of methods, which meet only here."""

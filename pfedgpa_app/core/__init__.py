"""What everything stands on: settings, weights, uploads, random streams, files."""

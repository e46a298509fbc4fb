"""What all other packages build on: settings, weights, uploads, random streams, files."""

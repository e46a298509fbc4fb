"""pFedGPA: a Flower app whose server generates each client its own weights."""

__version__ = "0.1.0"

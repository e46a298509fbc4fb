"""Local SGD and evaluation."""

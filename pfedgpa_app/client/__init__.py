"""The client's side of each message, and what it keeps between two of them."""

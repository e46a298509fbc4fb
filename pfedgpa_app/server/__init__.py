"""The server's side: which clients it asks, which replies it accepts, how they are evaluated."""

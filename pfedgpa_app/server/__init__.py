"""The server's side: who is asked, what is accepted, what it is worth."""

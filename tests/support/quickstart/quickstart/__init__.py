"""A user's own Flower app: only its server knows of pFedGPA."""

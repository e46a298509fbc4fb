"""Somebody's Flower app: nothing in it but its server knows of pFedGPA."""

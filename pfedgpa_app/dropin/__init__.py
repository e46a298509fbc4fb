"""`PFedGPA` for other people's Flower apps."""

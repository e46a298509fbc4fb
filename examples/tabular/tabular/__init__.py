"""A Flower app for tables, with pFedGPA in FedAvg's place."""

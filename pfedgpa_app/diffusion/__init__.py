"""Weights in, weights out: learn the distribution of clients' weights and denoise with it.

Nothing here knows of Flower, images or methods; a *latent* is a client's upload less the
population's drift, seen in few directions, at unit variance.
"""

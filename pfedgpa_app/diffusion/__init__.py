"""Weights in, weights out: learn the distribution of clients' weights and denoise with it.

Nothing here depends on Flower, images or methods. A *latent* is a client's upload less the
population's drift, projected onto few directions and scaled to unit variance.
"""

"""Ensembles that answer: opening, following activations, batching, modes and policies."""

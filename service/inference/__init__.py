"""Running ensembles: opening them, following activations, batching, modes and policies."""

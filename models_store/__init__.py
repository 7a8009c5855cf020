"""The contract between training and service: what a published ensemble is, where it lies, how its members run.

Nothing here imports torch or bentoml. `training` writes through this package and `service` reads through it.
"""

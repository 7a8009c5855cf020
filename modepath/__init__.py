"""Train ensembles along low-loss paths of neural networks, and predict with them.

    import modepath

    pets = modepath.fge(network=make, data=(train, validation, test), epochs=40, name="pets")
    answer = modepath.load("pets").predict(images)
    answer.probs, answer.mutual_information
    modepath.evaluate("pets", data=test)

The functions fge, independent, snapshot, curve, espro, swag, csgmcmc and soup train and publish; each takes the options
of `python -m training.METHOD` as keywords. `load` needs neither torch nor a server. Importing this package imports
neither torch nor bentoml.
"""

from __future__ import annotations

from models_store.errors import ModepathError
from modepath.ensemble import Answer, Ensemble, load
from modepath.methods import csgmcmc, curve, espro, evaluate, fge, independent, snapshot, soup, swag

__all__ = [
    "Answer",
    "Ensemble",
    "ModepathError",
    "csgmcmc",
    "curve",
    "espro",
    "evaluate",
    "fge",
    "independent",
    "load",
    "snapshot",
    "soup",
    "swag",
]

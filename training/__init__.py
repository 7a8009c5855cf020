"""Training: from data to a published ensemble. `python -m training.COMMAND` calls run(config) of a module."""

"""Training: from data to a published ensemble. `python -m training.COMMAND` calls run(config) of a module."""

import logging

# Every part of training logs here. Commands show the log (training/command.py); a program that configures logging itself
# gets the records through its own handlers.
logger = logging.getLogger("modepath")

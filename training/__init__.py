"""Training: from data to a published ensemble. Every command is a Config and a function run(config): python -m training.COMMAND."""

import logging

# Every part of training logs here. Commands show the log (training/command.py); a program that configures logging itself gets the
# records through its own handlers.
logger = logging.getLogger("modepath")

"""Training: from data to a published ensemble. Every command is a Config and a function run(config): python -m training.COMMAND."""

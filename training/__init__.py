"""The job side: from data to a published ensemble. Every door is a Config and a run(config): python -m training.<door>."""

"""The service under load, attack and failure: one table per script."""

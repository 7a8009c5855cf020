"""One training on several machines: chains of legs as tasks of Ray."""

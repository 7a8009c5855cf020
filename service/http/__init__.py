"""HTTP: connections, bodies, images, limits, errors and responses."""

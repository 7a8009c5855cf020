"""Running the service: settings, metrics, logs, supervision, and everything that touches BentoML internals."""

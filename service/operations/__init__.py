"""Running the service: settings, metrics, logs, supervision, and all that touches BentoML internals."""

"""The HTTP service, started by `bentoml serve`. It reads the store through models_store and does not need torch."""

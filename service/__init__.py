"""The HTTP side: bentoml serve. It reads the store through models_store and knows no torch."""

"""What a different network for each query costs an attacker: python -m benchmarks.defense."""

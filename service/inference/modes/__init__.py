"""How an ensemble answers. Each mode implements session.Session, and batching.py runs it."""

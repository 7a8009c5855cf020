"""Texts about published versions for people: a model card, and what differs between two versions."""

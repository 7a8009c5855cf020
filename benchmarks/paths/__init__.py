"""Curves and simplexes: one table or figure per script."""

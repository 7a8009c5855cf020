"""Figures of the papers, from published ensembles: each file measures, writes tables, and draws."""

"""Figures of the papers, for published ensembles. Each module measures, writes tables, and draws."""

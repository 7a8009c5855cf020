"""Geometry of weight space. Shapes are described by coefficients over vertices; they do not depend on the weights."""

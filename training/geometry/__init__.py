"""Where networks lie in weight space: shapes give coefficients over vertices, and never see a weight."""

"""Where FGE, curves and simplexes pay: the papers' comparisons where networks fit their training images, and where they start from a finished network."""

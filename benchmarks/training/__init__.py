"""What ensembles cost and give: one table per script."""

"""What decisions are worth: one table per script."""

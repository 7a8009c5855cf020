"""Measurements. Each script prints one table; results/ and LOG.md keep them."""

"""From trained weights to published members: batch norm, export, temperature, bank, publication."""

"""What ensembles take: images, features and tokens, and the rows of tables that become features."""

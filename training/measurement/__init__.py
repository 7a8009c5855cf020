"""What is measured on published ensembles: scores along paths, planes, and their figures."""

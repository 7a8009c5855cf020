"""Several machines: replicas on one bucket, and a simulation of a fleet."""

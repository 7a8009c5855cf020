"""What a store records beside its versions: their numbers, which of them is active, and which is a canary."""

"""What a store records beside its versions: their numbers, which of them serve, and which are on trial."""

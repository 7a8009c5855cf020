"""What is left after a kill, a full disk, a broken disk, or a changed byte; and the service under all of that at once."""

"""Late labels: answers are kept in a database, so that the labels that clients send later can be compared with them."""

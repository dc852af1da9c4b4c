"""What the data looks like, and nothing about how it is made."""

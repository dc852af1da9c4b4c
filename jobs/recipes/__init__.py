"""Shipped recipes: one complete run per TOML file."""

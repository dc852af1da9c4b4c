"""Shipped prompts: one TOML file per version, never edited once captions name it."""

"""Curation: from raw media to packed sequences, as stages over Ray Data."""

"""Emu3's networks on one device; knows nothing of Ray or tables."""

"""Emu3's vision tokenizer: images and video to codes and back."""

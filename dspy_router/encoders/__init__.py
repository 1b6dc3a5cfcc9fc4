"""Frozen text to unit vectors, and the one trainable exception, `TokenEncoder`."""

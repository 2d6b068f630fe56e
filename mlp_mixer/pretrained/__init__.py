"""Weights from elsewhere: other formats, other resolutions."""

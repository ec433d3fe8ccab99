"""Samples over a corpus, the stages' candidate blocks, and the selection index."""

"""Measuring a checkpoint, the cost of getting there, and telling both."""

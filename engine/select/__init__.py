"""Choosing a stage's data from its scored candidates."""

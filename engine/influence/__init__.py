"""Influence models: predicting a sample's oracle influence from its text, and scoring the corpus with that."""

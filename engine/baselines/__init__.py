"""Baselines of data selection: what scores samples without a look at the model that is trained. Lower scores are selected first."""

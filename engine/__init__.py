"""The model-aware loop: pretrain, probe, fit, score, select, evaluate, and what runs them in order."""

"""Oracle influences: one optimizer step on a sample, and how the reference loss moves."""

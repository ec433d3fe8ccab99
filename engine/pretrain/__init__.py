"""The language model: shapes, schedule, DeepSpeed trainer and checkpoints."""

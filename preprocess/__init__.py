"""Text in, indexed tokens out: readers, tokenizers, the ``.bin``/``.idx`` format, and the artifact protocol.

Nothing here imports torch, so preprocessing workers start fast and run on machines without it.
"""

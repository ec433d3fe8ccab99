"""The ``mates`` command, and how processes start."""

"""Ready-made check strategies."""

"""Private, op-agnostic helpers. Nothing here knows an op, a backend or a model."""

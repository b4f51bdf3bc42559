"""Literal twins of what the package does fast: they define what is right."""

"""Layers of models that have lost channels."""

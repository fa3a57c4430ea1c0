"""Inspection of models and policies: trace, doctor and compare."""

"""Stages: what one reads and leaves, and how a rank that runs it lives and ends."""

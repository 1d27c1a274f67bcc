"""Ground floor: a recipe section in, a trained model directory out."""

__version__ = "0.1.0"

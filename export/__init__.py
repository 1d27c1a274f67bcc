"""First floor, stands on engine: a model directory in, a smaller model or a served engine out."""

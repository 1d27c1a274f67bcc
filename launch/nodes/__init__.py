"""Training on several hosts: their command lines, the line between their launchers, and the look at them beforehand."""

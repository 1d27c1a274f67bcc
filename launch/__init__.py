"""Top floor: where and how stages start, and the command line."""

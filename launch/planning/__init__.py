"""What a training stage needs in memory, before anything runs."""

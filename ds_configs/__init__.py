"""ZeRO configurations: ordinary DeepSpeed JSON; `auto` stands where the recipe decides."""

"""Training: the loop, its processes under Accelerate and DeepSpeed, checkpoints, optimizers, schedules."""

"""What a training step needs around the objective: optimizer, schedules, gradients, checkpoints."""

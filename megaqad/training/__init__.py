"""The loop around the step: optimizer and schedule, checkpoints, logs."""

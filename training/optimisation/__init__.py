"""Training: the loop, its steps and schedules, hardware, seeds, and the trial before it begins."""

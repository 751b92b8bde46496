"""The objectives: paths, timesteps, formulations; sampling; validation at fixed noise."""

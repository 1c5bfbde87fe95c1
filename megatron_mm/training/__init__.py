"""The training loop and what keeps a run alive: optimizer, checkpoints, stop signals, telemetry."""

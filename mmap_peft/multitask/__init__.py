"""Many tasks on one model."""

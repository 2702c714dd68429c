"""Where prompts enter a frozen model."""

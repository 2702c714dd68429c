"""Methods that add no prompts, for comparison with those that do."""

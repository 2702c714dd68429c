"""Ways of tuning a CLIP that are no prompts: what to compare prompts with."""

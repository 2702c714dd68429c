"""The PEFT tuner that adds prompts to a frozen model."""

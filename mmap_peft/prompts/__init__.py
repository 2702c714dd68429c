"""What is learned: parameters in, prompts out."""

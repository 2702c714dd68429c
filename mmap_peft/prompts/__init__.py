"""Prompt methods: their configs, and the modules that compute prompts from parameters."""

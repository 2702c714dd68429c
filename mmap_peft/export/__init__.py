"""Exports one task as a module or a file, from a model, prompts and class weights."""

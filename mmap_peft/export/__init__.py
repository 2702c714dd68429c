"""One task as a module and as a file. Knows no classifier: it is given a model, prompts and class weights."""

"""The commands of `mmap-peft`, one file each: the function `main` takes the arguments that follow the name."""

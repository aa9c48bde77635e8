"""What runs on the machine. Standard library only: the image needs a Python and nothing else."""

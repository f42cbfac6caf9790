"""What stands under every run: files, processes, checkpoints, the run folder and its budget."""

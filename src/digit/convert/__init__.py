"""Other people's checkpoints to ours. Foreign layouts, key names and id offsets live here and nowhere else."""

"""What all stages share: loop, checkpoints, metrics, run folders; runs -> networks; tokens."""

"""Our speed and memory against diffusers': the same weights, the same input, turn by turn in one run."""

"""What a run will need, with nothing loaded."""

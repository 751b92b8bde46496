"""What is watched while a run trains, and what is told of it."""

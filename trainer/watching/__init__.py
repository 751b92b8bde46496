"""What is watched while a run trains, and what is reported of it."""

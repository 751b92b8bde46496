"""The scripts that train and check the small networks of the world."""

"""Couplings: noise and what a teacher's solver makes of it, as training shards for few-step students."""

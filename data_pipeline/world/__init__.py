"""A miniature universe of drawn scenes in which every stage of the big system is real."""

"""Commands around the evaluation: sample sheets, preference pairs, comparisons, rankings, the autoencoder report."""

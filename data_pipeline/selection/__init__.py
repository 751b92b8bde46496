"""Which rows are trained on: filters, columns that came later, takedowns, mixes of datasets."""

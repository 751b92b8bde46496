"""The report: from the rows of runs to HTML, Markdown, JSON and pictures."""

"""The eval service: watches runs, evaluates each new checkpoint once, and shows it all in a browser."""

"""What is made of finished runs: the results file, pictures and the report."""

"""What users hand in, as the solvers see it."""

"""Solutions for many strengths, of one problem and of the folds of a cross-validation."""

"""Configurations trained again on folds, and the choice of models to take the mean of."""

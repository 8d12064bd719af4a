"""Measuring models and samples: likelihoods over a data set, distances, baselines."""

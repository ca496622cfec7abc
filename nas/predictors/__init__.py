"""Predictors: estimate what an architecture would score, with error bars, from those that were evaluated."""

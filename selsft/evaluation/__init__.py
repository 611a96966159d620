"""Measuring a model: multiple-choice options scored by likelihood, as lm-evaluation-harness does."""

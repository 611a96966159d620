"""Skill forgetting: fine-tune, randomise the labels, and measure how far the forgetting reaches."""

"""Supervised fine-tuning: what rows of labelled data become, which head a model gets, and how it is scored."""

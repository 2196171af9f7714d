"""The helper of the five notebooks: what they use and do not teach."""

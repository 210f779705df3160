"""Differential privacy: what releases cost, who has paid how much, and what known noise bounds."""

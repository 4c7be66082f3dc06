"""The paper's baselines and ablations, trained and scored."""

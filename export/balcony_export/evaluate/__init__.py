"""How good each exit is: text, tasks, and the adapter for lm-evaluation-harness."""

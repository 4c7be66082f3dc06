"""The controller: from a budget and what was measured to the exit of the next token. Pure: no clock, sensor or engine."""

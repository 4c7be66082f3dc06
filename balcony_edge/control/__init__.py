"""The controller: chooses the exit of the next token from a budget and measurements. Pure: no clock, sensor or engine."""

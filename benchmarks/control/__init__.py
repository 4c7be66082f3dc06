"""The controller, policies, sensors and device profiles."""

"""HTTP: routes, connections, and the process that serves them. It decodes nothing."""

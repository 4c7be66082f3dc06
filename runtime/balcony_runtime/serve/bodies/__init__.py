"""Bodies: what a request may ask for, its budget, and how it is refused. It knows neither HTTP nor threads."""

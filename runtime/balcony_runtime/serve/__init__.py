"""``balcony-edge serve``: an HTTP server in OpenAI's shapes with a budget for each request (extra ``[serve]``)."""

"""Structure: replies that follow a JSON schema, a regular expression, a grammar, or the schemas of tools."""

"""Streams in company: members of a KV pool, passes that they share, the rounds of the decode loop, and admission."""

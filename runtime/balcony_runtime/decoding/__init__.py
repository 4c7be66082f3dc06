"""Decoding: the decode loop, sampling, and the policies that choose an exit."""

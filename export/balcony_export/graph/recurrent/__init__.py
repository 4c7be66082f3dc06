"""Recurrent mixers (state spaces, gated delta rule): stand-ins for tracing, and passes over their graphs."""

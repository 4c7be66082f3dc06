"""From logits to tokens: the decode loop, sampling, and the policies that choose an exit."""

"""The joint decision about several streams on one device: who steps in the next round, and at which exit."""

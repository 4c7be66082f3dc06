"""Training balconies on a frozen backbone by self-distillation."""

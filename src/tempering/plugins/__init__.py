"""What other programs load of ours, by their own names for it. Nothing here is imported by the rest."""
